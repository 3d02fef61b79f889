"""Inputs of a backend, and the interface that every backend module implements.

Letters in the package: B sequences of S positions, or T packed tokens of N sequences; A relation heads; D_t and D_s
head widths of teacher and student; R relations; `_t` teacher, `_s` student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minilm_kernels._choices import Reduction

from .masks import Mask


@dataclass(frozen=True)
class RelationInputs:
    """Validated tensors of one call and the relations between them.

    Two indices into the tensors name a relation: (m, m) is a self relation; (m, n) takes queries from tensor m and keys
    from tensor n.
    """

    teacher: Sequence[Tensor]  # each (B, S, A, D_t) or (T, A, D_t), any strides; keys may have fewer heads
    student: Sequence[Tensor]  # each (B, S, A, D_s) or (T, A, D_s), likewise
    relations: Sequence[tuple[int, int]]
    mask: Mask
    teacher_scale: float | None = None  # None: 1 / sqrt(D_t)
    student_scale: float | None = None  # None: 1 / sqrt(D_s)
    weights: Sequence[float] | None = None  # (R,), weights of a reduced loss's relations in their sum

    @property
    def heads(self) -> int:
        """Number of relation heads, A, which all queries have."""
        return self.student[self.relations[0][0]].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of results and stored gradients: float32, or float64 if any input is float64."""
        return result_dtype(self.teacher, self.student)

    def key_groups(self, relation: tuple[int, int]) -> tuple[int, int]:
        """Returns how many query heads share a key head in the teacher, and how many in the student."""
        _, key = relation
        return self.heads // self.teacher[key].shape[-2], self.heads // self.student[key].shape[-2]

    def scales(self, relation: tuple[int, int]) -> tuple[float, float]:
        """Returns the scale of the teacher's scores and that of the student's."""
        width_t, width_s = (model[relation[0]].shape[-1] for model in (self.teacher, self.student))
        scale_t = width_t**-0.5 if self.teacher_scale is None else self.teacher_scale
        scale_s = width_s**-0.5 if self.student_scale is None else self.student_scale
        return scale_t, scale_s

    def total(self, values: Tensor) -> Tensor:
        """Returns the weighted sum of the relations' values, a scalar; without weights, the values (R,) themselves."""
        if self.weights is None:
            return values
        first, *others = (weight * value for weight, value in zip(self.weights, values.unbind(), strict=True))
        return sum(others, first)


class Scaling(NamedTuple):
    """The backward of a reduced loss: result m is the sum of parts[p] · upstream[r] · weights[p] over the parts of m.

    `upstream` may be a scalar, which is then the upstream gradient of all relations.
    """

    upstream: Tensor  # (R,) or ()
    parts: list[Tensor]  # stored gradients; those of one result are neighbours
    relations: list[int]  # r of each part
    weights: list[float]
    owners: list[int]  # m of each part
    dtypes: list[torch.dtype]  # dtypes of the results

    def results(self, device: str) -> list[Tensor] | None:
        """Allocates the results, or returns None unless a kernel for float32 parts on this type of device serves."""
        served = (torch.float32, torch.float16, torch.bfloat16)
        if self.upstream.device.type != device or not all(dtype in served for dtype in self.dtypes):
            return None
        if not all(x.dtype == torch.float32 and x.is_contiguous() for x in self.parts):
            return None
        firsts = dict(zip(reversed(self.owners), reversed(self.parts), strict=True))
        return [torch.empty_like(firsts[m], dtype=dtype) for m, dtype in enumerate(self.dtypes)]


class BackendUnavailable(RuntimeError):
    """Raised by a backend that fails to start during a call; `backend="auto"` then tries the next one."""


class Backend(Protocol):
    """Interface of a backend module. Gradients are returned in the order of `grad_buffers` and in `inputs.dtype`.

    A backend for GPUs also has `scale(scaling)`. It computes a `Scaling` in one launch, or returns None if it does not
    serve it.
    """

    def unavailable_reason(self) -> str | None:
        """Returns why the backend cannot run in this process, or None if it can."""

    def unsupported_reasons(self, inputs: RelationInputs) -> list[str]:
        """Returns every reason why the backend cannot serve these inputs. The list is empty if it can."""

    def forward_reduced(
        self, inputs: RelationInputs, reduction: Reduction, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns `inputs.total` of the relations' values and, if `gradient` is True, the gradients of each value.

        The value of a relation is the sum of its rows' KL; `Mask.sequence_weights` has the weight of each row.
        """

    def forward_none(self, inputs: RelationInputs) -> Tensor:
        """Returns the KL of every row, (R, B, A, S) or (R, A, T), with 0 on rows that do not count."""

    def backward_none(self, inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
        """Returns the gradients of sum(row_grads * forward_none(inputs))."""


def result_dtype(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> torch.dtype:
    """Returns float64 if any input is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in (*teacher, *student)) else torch.float32


def grad_buffers(relations: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the relation's index and the student tensor's index of each stored gradient.

    A self relation has one gradient. A cross relation has one for its query and one for its key. Gradients of different
    relations are stored separately, so that the backward can scale each by its own upstream gradient.
    """
    return [(r, m) for r, (query, key) in enumerate(relations) for m in dict.fromkeys((query, key))]
