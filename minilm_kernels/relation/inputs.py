"""What a backend receives: the tensors of one call and the relations between them, validated.

Glossary of the package: B sequences of S positions, or T packed tokens of N sequences; A relation heads; D_t and D_s
widths of a teacher's and a student's head; R relations; `_t` teacher, `_s` student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .masks import Mask


@dataclass(frozen=True)
class RelationInputs:
    """R relations over shared tensors: (m, m) is a self relation; (m, n) takes queries from m and keys from n."""

    teacher: Sequence[Tensor]  # each (B, S, A, D_t) or (T, A, D_t), any strides
    student: Sequence[Tensor]  # each (B, S, A, D_s) or (T, A, D_s), any strides
    relations: Sequence[tuple[int, int]]
    mask: Mask
    teacher_scale: float | None = None  # None: 1 / sqrt(D_t)
    student_scale: float | None = None

    @property
    def heads(self) -> int:
        return self.student[0].shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics, results and stored gradients: float32, or float64 when any input is float64."""
        return result_dtype(self.teacher, self.student)

    def scales(self, relation: tuple[int, int]) -> tuple[float, float]:
        width_t, width_s = (side[relation[0]].shape[-1] for side in (self.teacher, self.student))
        scale_t = width_t**-0.5 if self.teacher_scale is None else self.teacher_scale
        scale_s = width_s**-0.5 if self.student_scale is None else self.student_scale
        return scale_t, scale_s


class BackendUnavailable(RuntimeError):
    """A backend finds, when it is called, that it cannot serve after all; `auto` goes on to the next one."""


class Backend(Protocol):
    """A module that computes problems. Gradients come in the order of `grad_buffers`, in `problem.dtype`."""

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run in this process; None when it can."""

    def unsupported_reasons(self, problem: RelationInputs) -> list[str]:
        """Every reason why it cannot serve this problem; empty when it can."""

    def forward_reduced(self, problem: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        """(R,) sums of KL, rows weighted by their sequence's weight (N,), and with `gradient` their derivatives."""

    def forward_none(self, problem: RelationInputs) -> Tensor:
        """(R, B, A, S) or (R, A, T): KL of every row, 0 on rows that do not take part."""

    def backward_none(self, problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
        """Derivatives of the rows' sum weighted by `row_grads`, of the shape that `rows` returns."""


def result_dtype(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in (*teacher, *student)) else torch.float32


def grad_buffers(relations: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(relation, student tensor) of each stored gradient: one of a self relation, query then key of a cross relation.

    Relations are kept apart, so that the backward can weigh each by what arrives for its own result.
    """
    return [(r, m) for r, (query, key) in enumerate(relations) for m in dict.fromkeys((query, key))]
