"""The two papers' losses as modules: which relations, how heads are cut, how relations are weighted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

from torch import Tensor, nn

from .relation import relation_kl_multi
from .relation.api import check_kind


class QKV(NamedTuple):
    """Projected queries, keys and values of one layer: each (B, S, hidden), or packed (T, hidden)."""

    query: Tensor
    key: Tensor
    value: Tensor


_NAMES = {"q": "query", "k": "key", "v": "value"}


class _RelationLoss(nn.Module):
    """Weighted sum of relation KLs over heads cut from the last axis of Q, K and V."""

    def __init__(
        self, argument: str, num_heads: int, relations: Mapping[str, float], reduction: str, backend: str
    ) -> None:
        super().__init__()
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1:
            raise ValueError(f"{argument}: expected a positive int, got {num_heads!r}")
        if not isinstance(relations, Mapping) or not relations:
            raise ValueError(f"relations: expected a mapping such as {{'qq': 1.0, 'vv': 1.0}}, got {relations!r}")
        for name, weight in relations.items():
            if not isinstance(name, str) or len(name) != 2 or any(letter not in _NAMES for letter in name):
                raise ValueError(f"relations: expected names of two letters of q, k and v, got {name!r}")
            if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
                raise ValueError(f"relations: expected a finite weight of 0 or more for {name!r}, got {weight!r}")
        self._argument = argument
        self.num_heads = num_heads
        self.relations = {name: float(weight) for name, weight in relations.items()}
        self.reduction = reduction
        self.backend = backend

    def extra_repr(self) -> str:
        return (
            f"{self._argument}={self.num_heads}, relations={self.relations}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}"
        )

    def forward(
        self,
        teacher: QKV,
        student: QKV,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        prefix_lens: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the relations: a scalar, or with reduction "none" (B, A, S), packed (A, T).

        Args:
            teacher: (B, S, hidden_t) each, or packed (T, hidden_t); must not require grad.
            student: (B, S, hidden_s) each, or packed (T, hidden_s).
            attention_mask, cu_seqlens, max_seqlen, causal, prefix_lens: as in `relation_kl`.

        Raises:
            ValueError, TypeError, RuntimeError: as `relation_kl`; also where the heads do not divide a width.
        """
        components = self.components(
            teacher,
            student,
            attention_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            prefix_lens=prefix_lens,
        )
        first, *others = (weight * components[name] for name, weight in self.relations.items())
        return sum(others, first)

    def components(
        self,
        teacher: QKV,
        student: QKV,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        prefix_lens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every relation by itself, unweighted, under its name; arguments and shapes as in `forward`."""
        values = relation_kl_multi(
            *self._heads(teacher, student, packed=cu_seqlens is not None),
            [(_NAMES[name[0]], _NAMES[name[1]]) for name in self.relations],
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            prefix_lens=prefix_lens,
            reduction=self.reduction,
            backend=self.backend,
        )
        return dict(zip(self.relations, values.unbind(), strict=True))

    def _heads(self, teacher: QKV, student: QKV, packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors that the relations name, last axis cut into heads: strided views, nothing is copied."""
        used = dict.fromkeys(_NAMES[letter] for name in self.relations for letter in name)
        sides = []
        for side, qkv in (("teacher", teacher), ("student", student)):
            if not isinstance(qkv, tuple | list) or len(qkv) != 3:
                raise TypeError(f"{side}: expected QKV(query, key, value), got {type(qkv).__name__}")
            tensors = QKV(*qkv)._asdict()
            for name in used:
                x = tensors[name]
                check_kind(f"{side}.{name}", x)
                if x.dim() != (2 if packed else 3):
                    layout = "packed (T, hidden), because cu_seqlens is given" if packed else "(B, S, hidden)"
                    raise ValueError(f"{side}.{name}: expected shape {layout}, got {tuple(x.shape)}")
            sides.append({name: tensors[name] for name in used})
        if any(x.shape[-1] % self.num_heads for tensors in sides for x in tensors.values()):
            raise ValueError(self._indivisible(sides))
        teacher_heads, student_heads = (
            {name: x.unflatten(-1, (self.num_heads, -1)) for name, x in tensors.items()} for tensors in sides
        )
        return teacher_heads, student_heads

    def _indivisible(self, sides: list[dict[str, Tensor]]) -> str:
        widths = {
            f"{side}.{name}": x.shape[-1]
            for side, tensors in zip(("teacher", "student"), sides, strict=True)
            for name, x in tensors.items()
        }
        common = math.gcd(*widths.values())
        legal = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        return f"{self._argument}: expected a divisor of every width ({found}), one of {legal}; got {self.num_heads}"


class MiniLMLoss(_RelationLoss):
    """MiniLM (arXiv 2002.10957, equations 5 to 9): KL of the attention distributions Q-K plus KL of V-V.

    Args:
        num_heads: attention heads A, of the teacher and of the student alike.
        reduction, backend: as in `relation_kl`.
    """

    def __init__(self, num_heads: int, *, reduction: str = "sequence", backend: str = "auto") -> None:
        super().__init__("num_heads", num_heads, {"qk": 1.0, "vv": 1.0}, reduction, backend)


class MiniLMv2Loss(_RelationLoss):
    """MiniLMv2 (arXiv 2012.15828, equations 5 to 8): weighted KL of any relations between Q, K and V.

    Args:
        num_relation_heads: A; divides the hidden sizes of teacher and student, whose own head counts do not matter.
            The paper takes 48 for base-size teachers and 64 for large ones.
        relations: weight of each relation, by name: "qk" has its rows from Q and its keys from K.
        reduction, backend: as in `relation_kl`.
    """

    def __init__(
        self,
        num_relation_heads: int,
        *,
        relations: Mapping[str, float] | None = None,
        reduction: str = "sequence",
        backend: str = "auto",
    ) -> None:
        relations = {"qq": 1.0, "kk": 1.0, "vv": 1.0} if relations is None else relations
        super().__init__("num_relation_heads", num_relation_heads, relations, reduction, backend)
