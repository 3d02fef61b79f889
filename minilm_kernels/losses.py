"""MiniLM's and MiniLMv2's losses as modules. A loss selects the relations to compare and weights them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import Unpack

from ._choices import BackendName, Reduction
from .relation import relation_kl_multi
from .relation.api import check_dense
from .relation.masks import MaskArgs


class QKV(NamedTuple):
    """Projected queries, keys and values of one layer, before they are split into heads.

    Args:
        query: (B, S, hidden), or packed (T, hidden).
        key: like `query`; grouped-query models have narrower keys.
        value: like `key`.

    Example:
        >>> import torch
        >>> from minilm_kernels import QKV
        >>> qkv = QKV(torch.zeros(2, 6, 24), torch.zeros(2, 6, 24), torch.zeros(2, 6, 24))
        >>> qkv.value.shape
        torch.Size([2, 6, 24])
    """

    query: Tensor
    key: Tensor
    value: Tensor


_NAMES = {"q": "query", "k": "key", "v": "value"}


class _RelationLoss(nn.Module):
    """Weighted sum of the KL of several relations. The last axis of queries, keys and values is split into heads."""

    def __init__(
        self,
        heads_argument: str,
        num_heads: int,
        relations: Mapping[str, float],
        reduction: Reduction,
        backend: BackendName,
    ) -> None:
        super().__init__()
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"{heads_argument}: expected a positive int, got {num_heads!r}")
        if not isinstance(relations, Mapping) or not relations:
            raise ValueError(f"relations: expected a mapping such as {{'qq': 1.0, 'vv': 1.0}}, got {relations!r}")
        for name, weight in relations.items():
            if not isinstance(name, str) or len(name) != 2 or any(letter not in _NAMES for letter in name):
                raise ValueError(f"relations: expected names of two letters out of q, k and v, got {name!r}")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
                raise ValueError(f"relations: expected a finite weight of 0 or more for {name!r}, got {weight!r}")
        self._heads_argument = heads_argument
        self.num_heads = num_heads
        self.relations = {name: float(weight) for name, weight in relations.items()}
        self.reduction = reduction
        self.backend = backend

    def extra_repr(self) -> str:
        return (
            f"{self._heads_argument}={self.num_heads}, relations={self.relations}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )

    def forward(
        self, teacher: QKV, student: QKV, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]
    ) -> Tensor:
        """Computes the weighted sum of the relations' KL.

        Args:
            teacher: the teacher's tensors, each (B, S, hidden_t), or packed (T, hidden_t); they must not require grad.
            student: the student's tensors, each (B, S, hidden_s), or packed (T, hidden_s).
            attention_mask: (B, S), nonzero on valid tokens; see `relation_kl`.
            **masks: `cu_seqlens`, `max_seqlen`, `causal` and `prefix_lens` as in `relation_kl`.

        Returns:
            A scalar, or with reduction "none" (B, A, S), packed (A, T).

        Raises:
            TypeError: see `relation_kl`.
            ValueError: see `relation_kl`. Also raised if the number of heads does not divide a width.
            RuntimeError: see `relation_kl`.
        """
        components = self.components(teacher, student, attention_mask, **masks)
        first, *others = (weight * components[name] for name, weight in self.relations.items())
        return sum(others, first)

    def components(
        self, teacher: QKV, student: QKV, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]
    ) -> dict[str, Tensor]:
        """Returns the unweighted KL of each relation, by its name. Arguments, shapes and errors are as in `forward`."""
        values = relation_kl_multi(
            *self._split_heads(teacher, student, packed=masks.get("cu_seqlens") is not None),
            [(_NAMES[name[0]], _NAMES[name[1]]) for name in self.relations],
            attention_mask=attention_mask,
            **masks,
            reduction=self.reduction,
            backend=self.backend,
        )
        return dict(zip(self.relations, values.unbind(), strict=True))

    def _split_heads(self, teacher: QKV, student: QKV, packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the tensors that the relations name, split into heads. They are views: nothing is copied."""
        used = dict.fromkeys(_NAMES[letter] for name in self.relations for letter in name)
        models = []
        for model, qkv in (("teacher", teacher), ("student", student)):
            if not isinstance(qkv, tuple | list) or len(qkv) != 3:
                raise TypeError(f"{model}: expected QKV(query, key, value), got {type(qkv).__name__}")
            tensors = QKV(*qkv)._asdict()
            for name in used:
                x = tensors[name]
                check_dense(f"{model}.{name}", x)
                if x.dim() != (2 if packed else 3):
                    layout = "packed (T, hidden), because cu_seqlens is given" if packed else "(B, S, hidden)"
                    raise ValueError(f"{model}.{name}: expected shape {layout}, got {tuple(x.shape)}")
            models.append({name: tensors[name] for name in used})
        if any(x.shape[-1] % self.num_heads for tensors in models for x in tensors.values()):
            raise ValueError(self._indivisible(models))
        teacher_heads, student_heads = (
            {name: x.unflatten(-1, (self.num_heads, -1)) for name, x in tensors.items()} for tensors in models
        )
        return teacher_heads, student_heads

    def _indivisible(self, models: list[dict[str, Tensor]]) -> str:
        """Returns the message for a number of heads that does not divide every width."""
        widths = {
            f"{model}.{name}": x.shape[-1]
            for model, tensors in zip(("teacher", "student"), models, strict=True)
            for name, x in tensors.items()
        }
        common = math.gcd(*widths.values())
        divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        return (
            f"{self._heads_argument}: expected a divisor of every width ({found}), one of {divisors}; "
            f"got {self.num_heads}"
        )


class MiniLMLoss(_RelationLoss):
    """MiniLM's loss: KL of the attention relation Q-K plus KL of the value relation V-V.

    Source: Wang et al., MiniLM, arXiv 2002.10957, equations 5 to 9. Teacher and student need the same number of
    attention heads.

    Args:
        num_heads: number of attention heads A of teacher and student.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_heads` is not a positive int.

    Example:
        >>> import torch
        >>> from minilm_kernels import QKV, MiniLMLoss
        >>> _ = torch.manual_seed(0)
        >>> teacher = QKV(*torch.randn(3, 2, 6, 48))  # each (B, S, hidden_t)
        >>> student = QKV(*torch.randn(3, 2, 6, 24))  # each (B, S, hidden_s)
        >>> loss = MiniLMLoss(num_heads=4)
        >>> f"{loss(teacher, student):.3f}"
        '1.059'
        >>> {name: f"{kl:.3f}" for name, kl in loss.components(teacher, student).items()}
        {'qk': '0.670', 'vv': '0.389'}
    """

    def __init__(self, num_heads: int, *, reduction: Reduction = "sequence", backend: BackendName = "auto") -> None:
        super().__init__("num_heads", num_heads, {"qk": 1.0, "vv": 1.0}, reduction, backend)


class MiniLMv2Loss(_RelationLoss):
    """MiniLMv2's loss: weighted sum of the KL of several relations, by default Q-Q, K-K and V-V.

    Source: Wang et al., MiniLMv2, arXiv 2012.15828, equations 5 to 8. Queries, keys and values are split into relation
    heads, whose number is independent of the attention heads of teacher and student.

    Args:
        num_relation_heads: number of relation heads A; it must divide the hidden sizes of teacher and student. The
            paper uses 48 for base-size teachers and 64 for large ones.
        relations: weight of each relation, by its name. A name has two letters out of q, k and v; the first gives the
            rows, the second the keys. None means {"qq": 1.0, "kk": 1.0, "vv": 1.0}.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_relation_heads` is not a positive int, or `relations` has an unknown name or a weight that is
            negative or not finite.

    Example:
        >>> import torch
        >>> from minilm_kernels import QKV, MiniLMv2Loss
        >>> _ = torch.manual_seed(0)
        >>> teacher = QKV(*torch.randn(3, 2, 6, 48))  # each (B, S, hidden_t)
        >>> student = QKV(*(x.requires_grad_() for x in torch.randn(3, 2, 6, 24)))  # each (B, S, hidden_s)
        >>> mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
        >>> loss = MiniLMv2Loss(num_relation_heads=12)(teacher, student, attention_mask=mask)
        >>> loss.backward()
        >>> f"{loss.item():.3f}"
        '1.548'
    """

    def __init__(
        self,
        num_relation_heads: int,
        *,
        relations: Mapping[str, float] | None = None,
        reduction: Reduction = "sequence",
        backend: BackendName = "auto",
    ) -> None:
        relations = {"qq": 1.0, "kk": 1.0, "vv": 1.0} if relations is None else relations
        super().__init__("num_relation_heads", num_relation_heads, relations, reduction, backend)
