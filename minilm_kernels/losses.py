"""MiniLM's and MiniLMv2's losses as modules. A loss selects the relations to compare and weights them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self, Unpack

from ._choices import BackendName, Reduction
from .relation import relation_kl, relation_kl_multi
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

_MODELS = ("teacher", "student")

Normalize: TypeAlias = Literal["cosine"]

# Tensors of one model: of one layer, or of several by the layer's number.
Operands: TypeAlias = QKV | Mapping[int, QKV]


class _Scores:
    """The scores of a relation: products of heads times a scale, or their cosines, divided by a temperature."""

    def __init__(self, normalize: Normalize | None, temperature: float) -> None:
        if normalize not in (None, "cosine"):
            raise ValueError(f'normalize: expected "cosine" or None, got {normalize!r}')
        self.normalize: Normalize | None = normalize
        self.temperature: float = _checked_temperature(temperature)
        self.plain = normalize is None and temperature == 1  # torch.compile would guard a comparison of floats

    def scale(self, heads: Tensor) -> float | None:
        """Factor of the products; None is 1 / sqrt(D)."""
        if self.plain:
            return None
        return 1 / self.temperature if self.normalize else 1 / (math.sqrt(heads.shape[-1]) * self.temperature)

    def vectors(self, heads: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The vectors, (..., A, D), whose products are the scores."""
        if not self.normalize:
            return heads
        if attention_mask is not None:  # the derivative of a norm is NaN where padding has NaN
            heads = heads.masked_fill((attention_mask == 0)[..., None, None], 0.0)
        smallest = max(1e-12, torch.finfo(heads.dtype).tiny)  # 1e-12 is 0 in float16, and 0 / 0 would be NaN
        return functional.normalize(heads, dim=-1, eps=smallest)

    def __repr__(self) -> str:
        return f"normalize={self.normalize!r}, temperature={self.temperature}"


class _Division(NamedTuple):
    """The division of a tensor into heads: `stored` heads, each `repeats` times, all of them cut into `used` heads."""

    stored: int
    repeats: int
    used: int

    def divides(self, width: int) -> bool:
        return width % self.stored == 0 and width * self.repeats % self.used == 0

    def heads(self, x: Tensor) -> Tensor:
        """(..., hidden) as (..., used, D); a view if nothing is repeated."""
        if self.repeats > 1:
            x = x.unflatten(-1, (self.stored, -1)).repeat_interleave(self.repeats, dim=-2).flatten(-2)
        return x.unflatten(-1, (self.used, -1))


class _Call(NamedTuple):
    """The relations of one operator call: those with the same number of heads and the same scales."""

    teacher: dict[str, Tensor]
    student: dict[str, Tensor]
    pairs: list[tuple[str, str]]
    components: list[str]


class _RelationLoss(nn.Module):
    """Weighted sum of the KL of several relations. The last axis of queries, keys and values is split into heads."""

    def __init__(
        self,
        heads_argument: str,
        num_heads: int,
        relations: Mapping[str, float],
        *,
        attention_heads: tuple[int, int] | None,
        layers: Mapping[int, int] | None,
        layer_weights: Mapping[int, float] | None,
        normalize: Normalize | None,
        temperature: float,
        reduction: Reduction,
        backend: BackendName,
    ) -> None:
        super().__init__()
        _check_count(heads_argument, num_heads)
        if not isinstance(relations, Mapping) or not relations:
            raise ValueError(f"relations: expected a mapping such as {{'qq': 1.0, 'vv': 1.0}}, got {relations!r}")
        for name, weight in relations.items():
            if not isinstance(name, str) or len(name) != 2 or any(letter not in _NAMES for letter in name):
                raise ValueError(f"relations: expected names of two letters out of q, k and v, got {name!r}")
            _check_weight("relations", name, weight)
        self._heads_argument = heads_argument
        self.num_heads = num_heads
        self.relations = {name: float(weight) for name, weight in relations.items()}
        self.attention_heads = attention_heads
        self.layers = None if layers is None else _checked_layers(layers)
        self.layer_weights = dict.fromkeys(self.layers or (), 1.0)
        for layer, weight in (layer_weights or {}).items():
            if layer not in self.layer_weights:
                raise ValueError(f"layer_weights: expected teacher's layers out of layers={layers!r}, got {layer!r}")
            _check_weight("layer_weights", layer, weight)
            self.layer_weights[layer] = float(weight)
        self.scores = _Scores(normalize, temperature)
        self.reduction = reduction
        self.backend = backend

    def extra_repr(self) -> str:
        layers = f"layers={self.layers}, layer_weights={self.layer_weights}, " if self.layers else ""
        return (
            f"{self._heads_argument}={self.num_heads}, relations={self.relations}, {layers}{self.scores}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )

    def with_layers(self, layers: Mapping[int, int]) -> Self:
        """Returns a copy of the loss for these layers, teacher's to student's, each of weight 1."""
        twin = copy.copy(self)
        twin.layers = _checked_layers(layers)
        twin.layer_weights = dict.fromkeys(twin.layers, 1.0)
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
            **masks: `query_mask`, `cu_seqlens`, `max_seqlen`, `causal` and `prefix_lens` as in `relation_kl`.

        Returns:
            A scalar, or with reduction "none" (B, A, S), packed (A, T).

        Raises:
            TypeError: see `relation_kl`. Also raised if dicts are given without `layers`, or the other way round.
            ValueError: see `relation_kl`. Also raised if the number of heads does not divide a width, or a layer is
                missing.
            RuntimeError: see `relation_kl`.
        """
        calls = self._calls(teacher, student, attention_mask, masks)
        if len(calls) > 1 or self.reduction == "none" or self._repeats(*calls):
            return self.total(self._components(calls, attention_mask, masks))
        ((kind, call),) = calls.items()
        weights = self._weights()
        return self._values(kind, call, attention_mask, masks, [weights[name] for name in call.components])

    def components(
        self, teacher: Operands, student: Operands, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]
    ) -> dict[str, Tensor]:
        """Returns the unweighted KL of each relation, by its name. Arguments, shapes and errors are as in `forward`.

        With `layers`, a name is the teacher's layer and the relation: "12/qq".
        """
        return self._components(self._calls(teacher, student, attention_mask, masks), attention_mask, masks)

    def _components(
        self, calls: Mapping[tuple, _Call], attention_mask: Tensor | None, masks: MaskArgs
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for kind, call in calls.items():
            values, heads = self._values(kind, call, attention_mask, masks), kind[0]
            if heads < self.num_heads and self.reduction == "sum":
                values = values * (self.num_heads // heads)
            elif heads < self.num_heads and self.reduction == "none":
                values = values.repeat_interleave(self.num_heads // heads, dim=-2)
            found.update(zip(call.components, values.unbind(), strict=True))
        prefixes = [f"{layer}/" for layer in self.layers] if self.layers else [""]
        return {prefix + name: found[prefix + name] for prefix in prefixes for name in self.relations}

    def _repeats(self, kind: tuple) -> bool:
        """Returns True if a call's values count several times, because its tensors have fewer heads than others."""
        return self.reduction == "sum" and kind[0] < self.num_heads

    def _values(
        self,
        kind: tuple,
        call: _Call,
        attention_mask: Tensor | None,
        masks: MaskArgs,
        weights: list[float] | None = None,
    ) -> Tensor:
        """The values of a call's relations, or their weighted sum."""
        _, scale_t, scale_s = kind
        return relation_kl_multi(
            call.teacher,
            call.student,
            call.pairs,
            attention_mask=attention_mask,
            **masks,
            teacher_scale=scale_t,
            student_scale=scale_s,
            weights=weights,
            reduction=self.reduction,
            backend=self.backend,
        )

    def _calls(
        self, teacher: Operands, student: Operands, attention_mask: Tensor | None, masks: MaskArgs
    ) -> dict[tuple, _Call]:
        """The operator calls, by their number of heads and the scales of teacher and student."""
        packed = masks.get("cu_seqlens") is not None
        calls: dict[tuple, _Call] = {}
        for prefix, *layer in self._by_layer(teacher, student):
            models = [self._used(name, qkv, packed) for name, qkv in zip(_MODELS, layer, strict=True)]
            vectors: dict[str, list[Tensor]] = {}
            for relation in self.relations:
                names = []
                for letter, divisions in zip(relation, self._divisions(relation, models), strict=True):
                    plain = set(divisions) == {self._plain}
                    names.append(f"{prefix}{_NAMES[letter]}" + ("" if plain else f" of {relation}"))
                    if names[-1] not in vectors:
                        heads = [division.heads(x[letter]) for division, x in zip(divisions, models, strict=True)]
                        vectors[names[-1]] = [self.scores.vectors(x, attention_mask) for x in heads]
                query_t, query_s = vectors[names[0]]
                kind = query_t.shape[-2], self.scores.scale(query_t), self.scores.scale(query_s)
                call = calls.setdefault(kind, _Call({}, {}, [], []))
                for name in names:
                    call.teacher[name], call.student[name] = vectors[name]
                call.pairs.append((names[0], names[1]))
                call.components.append(prefix + relation)
        return calls

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum of the values that `components` returned, which is the loss."""
        first, *others = (weight * components[name] for name, weight in self._weights().items())
        return sum(others, first)

    def _weights(self) -> dict[str, float]:
        """The weight of each component in the loss."""
        layers = {f"{layer}/": weight for layer, weight in self.layer_weights.items()} or {"": 1.0}
        return {p + name: w * weight for p, w in layers.items() for name, weight in self.relations.items()}

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

    def _used(self, model: str, qkv: QKV, packed: bool) -> dict[str, Tensor]:
        """The tensors that the relations name, by their letters."""
        if not isinstance(qkv, tuple | list) or len(qkv) != 3:
            raise TypeError(f"{model}: expected QKV(query, key, value), got {type(qkv).__name__}")
        tensors = dict(zip(_NAMES, qkv, strict=True))
        used = {letter: tensors[letter] for relation in self.relations for letter in relation}
        for letter, x in used.items():
            check_dense(f"{model}.{_NAMES[letter]}", x)
            if x.dim() != (2 if packed else 3):
                layout = "packed (T, hidden), because cu_seqlens is given" if packed else "(B, S, hidden)"
                raise ValueError(f"{model}.{_NAMES[letter]}: expected shape {layout}, got {tuple(x.shape)}")
        return used

    @property
    def _plain(self) -> _Division:
        return _Division(self.num_heads, 1, self.num_heads)

    def _divisions(self, relation: str, models: list[dict[str, Tensor]]) -> list[list[_Division]]:
        """The divisions of the query and of the key, each for teacher and student."""
        widths = [{letter: x.shape[-1] for letter, x in model.items()} for model in models]
        if relation[0] == relation[1]:
            own = [self._own_heads(relation[0], model) for model in widths]
            used = math.lcm(*own)
            query = key = [_Division(stored, used // stored, used) for stored in own]
        else:
            heads = self.attention_heads or (None, None)
            found = [self._cross(relation, *model) for model in zip(_MODELS, widths, heads, strict=True)]
            query, key = ([model[place] for model in found] for place in (0, 1))
        for letter, divisions in zip(relation, (query, key), strict=True):
            if not all(d.divides(model[letter]) for d, model in zip(divisions, widths, strict=True)):
                raise ValueError(self._indivisible(models))
        return [query, key]

    def _own_heads(self, letter: str, widths: Mapping[str, int]) -> int:
        """Number of heads of a tensor in its self relation."""
        return self.num_heads

    def _cross(
        self, relation: str, model: str, widths: Mapping[str, int], heads: int | None
    ) -> tuple[_Division, _Division]:
        """The divisions of query and key of a cross relation in a model with this number of attention heads.

        If one of the two is narrower, it has fewer heads, and attention repeats each of them, so that query head a
        meets key head a // (A / A_k). The repeated tensor is then cut into relation heads like the other one. If the
        relation heads are the attention heads, the operator does this without the repetition.
        """
        query, key = (widths[letter] for letter in relation)
        wide, narrow = max(query, key), min(query, key)
        if wide == narrow:
            return self._plain, self._plain
        narrower, wider = list(relation if query < key else relation[::-1])
        sizes = f"{model}.{_NAMES[narrower]} of width {narrow} and {model}.{_NAMES[wider]} of width {wide}"
        if heads is None:
            raise ValueError(
                f"relations: {relation!r} of {sizes} needs attention_heads, because each head of the narrower one "
                f"belongs to several heads of the other; give attention_heads, or leave out {relation!r}"
            )
        stored, rest = divmod(heads * narrow, wide)
        if rest or wide % heads or stored == 0 or heads % stored:
            raise ValueError(
                f"{self._heads_argument if heads == self.num_heads else 'attention_heads'}: {sizes} do not belong to "
                f"{heads} attention heads; expected heads of one width, whose numbers divide each other"
            )
        if key == narrow and heads == self.num_heads:
            return self._plain, _Division(stored, 1, stored)
        repeated = _Division(stored, heads // stored, self.num_heads)
        return (self._plain, repeated) if key == narrow else (repeated, self._plain)

    def _indivisible(self, models: list[dict[str, Tensor]]) -> str:
        """Returns the message for a number of heads that does not divide every width."""
        widths = {
            f"{model}.{_NAMES[letter]}": x.shape[-1]
            for model, tensors in zip(_MODELS, models, strict=True)
            for letter, x in tensors.items()
        }
        common = math.gcd(*widths.values())
        divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        return (
            f"{self._heads_argument}: expected a divisor of every width ({found}), one of {divisors}; "
            f"got {self.num_heads}"
        )


def _checked_temperature(temperature: float) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature!r}")
    return float(temperature)


def _check_count(argument: str, count: object) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{argument}: expected a positive int, got {count!r}")


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
    attention heads. With grouped-query attention, keys and values have fewer heads, which are found by their width;
    teacher and student may have different numbers of them. The loss is that of repeating each key and value head.

    Args:
        num_heads: number of attention heads A of teacher and student.
        layers: the layers to compare; see `MiniLMv2Loss`.
        layer_weights: weight of each pair of layers; see `MiniLMv2Loss`.
        normalize: "cosine" for cosines as scores; see `MiniLMv2Loss`.
        temperature: divides the scores; see `MiniLMv2Loss`.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_heads` is not a positive int; `layers` maps no ints to ints; `layer_weights` has other layers;
            `normalize` or `temperature` is not as above.

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
        normalize: Normalize | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "sequence",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__(
            "num_heads",
            num_heads,
            {"qk": 1.0, "vv": 1.0},
            attention_heads=(num_heads, num_heads),
            layers=layers,
            layer_weights=layer_weights,
            normalize=normalize,
            temperature=temperature,
            reduction=reduction,
            backend=backend,
        )

    def _own_heads(self, letter: str, widths: Mapping[str, int]) -> int:
        return self.num_heads * widths["k"] // widths["q"]  # values have as many heads as keys


class MiniLMv2Loss(_RelationLoss):
    """MiniLMv2's loss: weighted sum of the KL of several relations, by default Q-Q, K-K and V-V.

    Source: Wang et al., MiniLMv2, arXiv 2012.15828, equations 5 to 8. Queries, keys and values are split into relation
    heads, whose number is independent of the attention heads of teacher and student.

    Args:
        num_relation_heads: number of relation heads A; it must divide the hidden sizes of teacher and student. The
            paper uses 48 for base-size teachers and 64 for large ones.
        relations: weight of each relation, by its name. A name has two letters out of q, k and v; the first gives the
            rows, the second the keys. None means {"qq": 1.0, "kk": 1.0, "vv": 1.0}.
        attention_heads: number of attention heads, or those of teacher and student. Only needed for cross relations
            such as "qk" of models with grouped-query attention: each key head is repeated as in the attention, and the
            repeated keys are split into relation heads like the queries. Relations among keys and values ("kk", "vv",
            "kv", "vk") split the narrower tensors as they are.
        layers: the layers to compare, teacher's to student's: {12: 6, 9: 3}. The loss then takes dicts from layer to
            QKV, and sums up the layers. None: one pair of layers, given as QKV.
        layer_weights: weight of each pair, by the teacher's layer. Layers that are left out have weight 1.
        normalize: "cosine" divides each vector of a head by its norm, so that scores are cosines, without the factor
            1 / sqrt(D) (BitDistill, arXiv 2510.13998, algorithm 1). None: the papers' scaled products.
        temperature: divides the scores of teacher and student. The loss is not multiplied by its square.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_relation_heads` or one of `attention_heads` is not a positive int; `relations` has an unknown
            name or a weight that is negative or not finite; `layers` maps no ints to ints; `layer_weights` has other
            layers; `normalize` or `temperature` is not as above.

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
        attention_heads: int | tuple[int, int] | None = None,
        layers: Mapping[int, int] | None = None,
        layer_weights: Mapping[int, float] | None = None,
        normalize: Normalize | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "sequence",
        backend: BackendName = "auto",
    ) -> None:
        if isinstance(attention_heads, int):
            attention_heads = attention_heads, attention_heads
        for count in attention_heads or ():
            _check_count("attention_heads", count)
        super().__init__(
            "num_relation_heads",
            num_relation_heads,
            {"qq": 1.0, "kk": 1.0, "vv": 1.0} if relations is None else relations,
            attention_heads=attention_heads,
            layers=layers,
            layer_weights=layer_weights,
            normalize=normalize,
            temperature=temperature,
            reduction=reduction,
            backend=backend,
        )


class SelfRelationLoss(nn.Module):
    """KL of the self relations of two tensors of hidden states: a loss between any two layers of two models.

    R = softmax(X Xᵀ / √D) for each head of X; see `relation_kl`. The form (student, teacher) is that of losses in
    distillation frameworks which pair outputs of modules. The two hidden sizes may differ.

    Args:
        num_heads: number of relation heads A; it must divide both hidden sizes.
        normalize: "cosine" for cosines as scores; see `MiniLMv2Loss`.
        temperature: divides the scores; see `MiniLMv2Loss`.
        reduction: "sequence", "token", "sum" or "none"; see `relation_kl`.
        backend: "auto", or a name from `backend_status()`.

    Raises:
        ValueError: `num_heads` is not a positive int, or see `MiniLMv2Loss`.

    Example:
        >>> import torch
        >>> from minilm_kernels import SelfRelationLoss
        >>> _ = torch.manual_seed(0)
        >>> student = torch.randn(2, 6, 24, requires_grad=True)
        >>> teacher = torch.randn(2, 6, 48)
        >>> f"{SelfRelationLoss(num_heads=4)(student, teacher).item():.3f}"
        '0.516'
    """

    def __init__(
        self,
        num_heads: int,
        *,
        normalize: Normalize | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "sequence",
        backend: BackendName = "auto",
    ) -> None:
        super().__init__()
        _check_count("num_heads", num_heads)
        self.num_heads, self.scores = num_heads, _Scores(normalize, temperature)
        self.reduction, self.backend = reduction, backend

    def forward(
        self, student: Tensor, teacher: Tensor, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]
    ) -> Tensor:
        """Computes the loss.

        Args:
            student: (B, S, hidden_s), or packed (T, hidden_s).
            teacher: (B, S, hidden_t), or packed (T, hidden_t); it must not require grad.
            attention_mask: (B, S), nonzero on valid tokens; see `relation_kl`.
            **masks: `query_mask`, `cu_seqlens`, `max_seqlen`, `causal` and `prefix_lens` as in `relation_kl`.

        Returns:
            A scalar, or with reduction "none" (B, A, S), packed (A, T).

        Raises:
            TypeError: see `relation_kl`.
            ValueError: see `relation_kl`. Also raised if the number of heads does not divide a hidden size.
            RuntimeError: see `relation_kl`.
        """
        heads = []
        for name, x in (("teacher", teacher), ("student", student)):
            check_dense(name, x)
            if x.dim() not in (2, 3) or x.shape[-1] % self.num_heads:
                raise ValueError(
                    f"{name}: expected shape (B, S, hidden), or packed (T, hidden), with a hidden size that is a "
                    f"multiple of num_heads={self.num_heads}, got {tuple(x.shape)}"
                )
            heads.append(self.scores.vectors(x.unflatten(-1, (self.num_heads, -1)), attention_mask))
        return relation_kl(
            heads[0],
            None,
            heads[1],
            None,
            attention_mask=attention_mask,
            **masks,
            teacher_scale=self.scores.scale(heads[0]),
            student_scale=self.scores.scale(heads[1]),
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, {self.scores}, reduction={self.reduction!r}, backend={self.backend!r}"


def logit_kl(
    teacher_logits: Tensor, student_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Computes the mean KL(teacher ‖ student) of the models' predictions, as a term beside other losses.

    τ² / n Σ_i KL(softmax(teacher_i / τ) ‖ softmax(student_i / τ)), by torch's `kl_div` in float32. The factor τ² keeps
    the size of the gradients (Hinton et al., arXiv 1503.02531).

    Args:
        teacher_logits: (..., vocabulary); it must not require grad. A logit of -inf, as of a forbidden token, adds
            nothing to the divergence.
        student_logits: (..., vocabulary), of the same shape.
        mask: (...), nonzero on the n rows that count, such as `attention_mask` or `labels != -100`; None for all.
        temperature: τ.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 if no row counts.

    Raises:
        ValueError: the shapes differ, so that the vocabularies differ, for example; the teacher requires grad; the
            temperature is not a finite number above 0.

    Example:
        >>> import torch
        >>> from minilm_kernels.losses import logit_kl
        >>> student = torch.zeros(2, 5, 100, requires_grad=True)
        >>> teacher, mask = torch.randn(2, 5, 100), torch.ones(2, 5)
        >>> logit_kl(teacher, student, mask, temperature=2.0).backward()
    """
    temperature = _checked_temperature(temperature)
    teacher, student, count = _rows("logits", teacher_logits, student_logits, mask)
    log_t, log_s = (functional.log_softmax(x / temperature, dim=-1) for x in (teacher, student))
    impossible = log_t == -torch.inf  # contributes 0, not 0 · inf
    log_t, log_s = (x.masked_fill(impossible, 0.0) for x in (log_t, log_s))
    return functional.kl_div(log_s, log_t, reduction="sum", log_target=True) * temperature**2 / count


def hidden_mse(teacher_hidden: Tensor, student_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Computes the mean squared error of hidden states, as a term beside other losses.

    Args:
        teacher_hidden: (..., hidden); it must not require grad.
        student_hidden: (..., hidden), of the same shape. A student of another hidden size needs a projection to the
            teacher's, such as `torch.nn.Linear(hidden_s, hidden_t)`, which is trained with it.
        mask: (...), nonzero on the tokens that count; None for all.

    Returns:
        A scalar, float32 (float64 for float64 tensors); 0 if no token counts.

    Raises:
        ValueError: the shapes differ, or the teacher requires grad.

    Example:
        >>> import torch
        >>> from minilm_kernels.losses import hidden_mse
        >>> projection = torch.nn.Linear(24, 48)
        >>> hidden_mse(torch.zeros(2, 5, 48), projection(torch.zeros(2, 5, 24))).backward()
    """
    teacher, student, count = _rows("hidden", teacher_hidden, student_hidden, mask)
    return functional.mse_loss(student, teacher, reduction="sum") / (count * teacher.shape[-1])


def _rows(name: str, teacher: Tensor, student: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | int]:
    """Both tensors in float32 or float64, 0 on rows that do not count, and the number of the others, at least 1."""
    check_dense(f"teacher_{name}", teacher)
    check_dense(f"student_{name}", student)
    if teacher.shape != student.shape:
        remedy = {
            "logits": "both models need the same vocabulary and tokens",
            "hidden": "project the student's hidden states to the teacher's size, with torch.nn.Linear for example",
        }[name]
        raise ValueError(
            f"student_{name}: expected the shape of teacher_{name}, {tuple(teacher.shape)}, got "
            f"{tuple(student.shape)}; {remedy}"
        )
    if teacher.requires_grad:
        raise ValueError(f"teacher_{name}: it requires grad; detach it, or run the teacher under torch.no_grad()")
    wide = torch.promote_types(torch.promote_types(teacher.dtype, student.dtype), torch.float32)
    teacher, student = teacher.to(wide), student.to(wide)
    if mask is None:
        return teacher, student, max(teacher[..., 0].numel(), 1)
    if mask.shape != teacher.shape[:-1]:
        raise ValueError(f"mask: expected shape {tuple(teacher.shape[:-1])}, got {tuple(mask.shape)}")
    left_out = (mask == 0)[..., None]
    return teacher.masked_fill(left_out, 0.0), student.masked_fill(left_out, 0.0), (mask != 0).sum().clamp(min=1)
