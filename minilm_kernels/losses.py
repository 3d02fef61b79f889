"""MiniLM's and MiniLMv2's losses as modules. A loss selects the relations to compare and weights them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from typing_extensions import Self, Unpack

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

# Tensors of one model: of one layer, or of several by the layer's number.
Operands: TypeAlias = QKV | Mapping[int, QKV]


class _RelationLoss(nn.Module):
    """Weighted sum of the KL of several relations. The last axis of queries, keys and values is split into heads."""

    def __init__(
        self,
        heads_argument: str,
        num_heads: int,
        relations: Mapping[str, float],
        layers: Mapping[int, int] | None,
        layer_weights: Mapping[int, float] | None,
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
            _check_weight("relations", name, weight)
        self._heads_argument = heads_argument
        self.num_heads = num_heads
        self.relations = {name: float(weight) for name, weight in relations.items()}
        self.layers = None if layers is None else _checked_layers(layers)
        self.layer_weights = dict.fromkeys(self.layers or (), 1.0)
        for layer, weight in (layer_weights or {}).items():
            if layer not in self.layer_weights:
                raise ValueError(f"layer_weights: expected teacher's layers out of layers={layers!r}, got {layer!r}")
            _check_weight("layer_weights", layer, weight)
            self.layer_weights[layer] = float(weight)
        self.reduction = reduction
        self.backend = backend

    def extra_repr(self) -> str:
        layers = f"layers={self.layers}, layer_weights={self.layer_weights}, " if self.layers else ""
        return (
            f"{self._heads_argument}={self.num_heads}, relations={self.relations}, {layers}"
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )

    def with_layers(self, layers: Mapping[int, int]) -> Self:
        """Returns a copy of the loss for these layers, each of weight 1."""
        twin = copy.copy(self)
        twin.layers = _checked_layers(layers)
        twin.layer_weights = dict.fromkeys(layers, 1.0)
        return twin

    def forward(
        self, teacher: Operands, student: Operands, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]
    ) -> Tensor:
        """Computes the weighted sum of the relations' KL.

        Args:
            teacher: the teacher's tensors, each (B, S, hidden_t), or packed (T, hidden_t); they must not require grad.
                With `layers`, the tensors of each layer in a dict, as `record_qkv.pop()` returns them.
            student: the student's tensors, each (B, S, hidden_s), or packed (T, hidden_s). With `layers`, a dict.
            attention_mask: (B, S), nonzero on valid tokens; see `relation_kl`.
            **masks: `cu_seqlens`, `max_seqlen`, `causal` and `prefix_lens` as in `relation_kl`.

        Returns:
            A scalar, or with reduction "none" (B, A, S), packed (A, T).

        Raises:
            TypeError: see `relation_kl`. Also raised if dicts are given without `layers`, or the other way round.
            ValueError: see `relation_kl`. Also raised if the number of heads does not divide a width, or a layer is
                missing.
            RuntimeError: see `relation_kl`.
        """
        return self.total(self.components(teacher, student, attention_mask, **masks))

    def components(
        self, teacher: Operands, student: Operands, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]
    ) -> dict[str, Tensor]:
        """Returns the unweighted KL of each relation, by its name. Arguments, shapes and errors are as in `forward`.

        With `layers`, a name is the teacher's layer and the relation: "12/qq".
        """
        packed = masks.get("cu_seqlens") is not None
        names: list[str] = []
        tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        pairs: list[tuple[str, str]] = []
        for prefix, teacher_qkv, student_qkv in self._by_layer(teacher, student):
            for found, split in zip(tensors, self._split_heads(teacher_qkv, student_qkv, packed), strict=True):
                found.update({prefix + name: x for name, x in split.items()})
            names += [prefix + name for name in self.relations]
            pairs += [(prefix + _NAMES[name[0]], prefix + _NAMES[name[1]]) for name in self.relations]
        values = relation_kl_multi(
            *tensors, pairs, attention_mask=attention_mask, **masks, reduction=self.reduction, backend=self.backend
        )
        return dict(zip(names, values.unbind(), strict=True))

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum of the values that `components` returned, which is the loss."""
        layers = {f"{layer}/": weight for layer, weight in self.layer_weights.items()} or {"": 1.0}
        weights = {p + name: w * weight for p, w in layers.items() for name, weight in self.relations.items()}
        first, *others = (weight * components[name] for name, weight in weights.items())
        return sum(others, first)

    def num_items(self, attention_mask: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Returns the number of items over which the loss averages, for averages over several batches.

        The loss of a batch that is processed in parts is the sum of each part's loss times its number of items, divided
        by the items of all parts.

        Args:
            attention_mask: (B, S), nonzero on valid tokens.
            query_mask: (B, S), nonzero on the rows that count; None for all valid tokens.

        Returns:
            A scalar, int64: with reduction "token", the rows that count; with "sequence", the sequences that have any.

        Raises:
            ValueError: the reduction is "sum" or "none", which do not average.
        """
        if self.reduction not in ("sequence", "token"):
            raise ValueError(
                f'num_items: reduction "{self.reduction}" is not an average; expected "sequence" or "token"'
            )
        counted = attention_mask != 0
        if query_mask is not None:
            counted = counted & (query_mask != 0)
        return (counted if self.reduction == "token" else counted.any(-1)).sum()

    def _by_layer(self, teacher: Any, student: Any) -> Iterator[tuple[str, QKV, QKV]]:
        """Prefix of the components' names, teacher's and student's tensors, for each pair of layers."""
        for model, found in (("teacher", teacher), ("student", student)):
            if isinstance(found, Mapping) != (self.layers is not None):
                expected = "QKV(query, key, value)" if self.layers is None else "a dict of QKV, because of layers"
                raise TypeError(f"{model}: expected {expected}, got {type(found).__name__}")
        if self.layers is None:
            yield "", teacher, student
            return
        for model, found, layers in (("teacher", teacher, self.layers), ("student", student, self.layers.values())):
            if missing := [layer for layer in layers if layer not in found]:
                raise ValueError(
                    f"{model}: layers={self.layers} needs layer {missing[0]}, got {', '.join(map(str, found))}"
                )
        for layer_t, layer_s in self.layers.items():
            yield f"{layer_t}/", teacher[layer_t], student[layer_s]

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


def _check_weight(argument: str, name: object, weight: object) -> None:
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"{argument}: expected a finite weight of 0 or more for {name!r}, got {weight!r}")


def _checked_layers(layers: Mapping[int, int]) -> dict[int, int]:
    numbers = [*layers, *layers.values()] if isinstance(layers, Mapping) else []
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise ValueError(f"layers: expected a mapping from teacher's to student's layers, {{12: 6}}, got {layers!r}")
    return dict(layers)


class MiniLMLoss(_RelationLoss):
    """MiniLM's loss: KL of the attention relation Q-K plus KL of the value relation V-V.

    Source: Wang et al., MiniLM, arXiv 2002.10957, equations 5 to 9. Teacher and student need the same number of
    attention heads.

    Args:
        num_heads: number of attention heads A of teacher and student.
        layers: the layers to compare, teacher's to student's: {12: 6, 9: 3}. The loss then takes dicts from layer to
            QKV, and sums up the layers. None: one pair of layers, given as QKV.
        layer_weights: weight of each pair, by the teacher's layer. Layers that are left out have weight 1.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_heads` is not a positive int; `layers` maps no ints to ints; `layer_weights` has other layers.

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

    def __init__(
        self,
        num_heads: int,
        *,
        layers: Mapping[int, int] | None = None,
        layer_weights: Mapping[int, float] | None = None,
        reduction: Reduction = "sequence",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__("num_heads", num_heads, {"qk": 1.0, "vv": 1.0}, layers, layer_weights, reduction, backend)


class MiniLMv2Loss(_RelationLoss):
    """MiniLMv2's loss: weighted sum of the KL of several relations, by default Q-Q, K-K and V-V.

    Source: Wang et al., MiniLMv2, arXiv 2012.15828, equations 5 to 8. Queries, keys and values are split into relation
    heads, whose number is independent of the attention heads of teacher and student.

    Args:
        num_relation_heads: number of relation heads A; it must divide the hidden sizes of teacher and student. The
            paper uses 48 for base-size teachers and 64 for large ones.
        relations: weight of each relation, by its name. A name has two letters out of q, k and v; the first gives the
            rows, the second the keys. None means {"qq": 1.0, "kk": 1.0, "vv": 1.0}.
        layers: the layers to compare, teacher's to student's: {12: 6, 9: 3}. The loss then takes dicts from layer to
            QKV, and sums up the layers. None: one pair of layers, given as QKV.
        layer_weights: weight of each pair, by the teacher's layer. Layers that are left out have weight 1.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_relation_heads` is not a positive int; `relations` has an unknown name or a weight that is
            negative or not finite; `layers` maps no ints to ints; `layer_weights` has other layers.

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
        layers: Mapping[int, int] | None = None,
        layer_weights: Mapping[int, float] | None = None,
        reduction: Reduction = "sequence",
        backend: BackendName = "auto",
    ) -> None:
        relations = {"qq": 1.0, "kk": 1.0, "vv": 1.0} if relations is None else relations
        super().__init__("num_relation_heads", num_relation_heads, relations, layers, layer_weights, reduction, backend)
