"""`RelationTerm`: the relation loss as a term beside another loss, in any training loop.

The term records teacher and student during their own forwards. It is no module: the teacher stays out of the student's
`state_dict`, its parameters and its mode.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from minilm_kernels._full_attention import nearest_config
from minilm_kernels._wrappers import is_pretrained_model, unwrap
from minilm_kernels.losses import QKV, MiniLMLoss, MiniLMv2Loss
from minilm_kernels.qkv import FOR_OTHERS
from minilm_kernels.recording import record_qkv, until_recorded
from minilm_kernels.relation.masks import MaskArgs

__all__ = ["RelationTerm"]

Loss: TypeAlias = MiniLMLoss | MiniLMv2Loss
Rotary: TypeAlias = Literal["before", "after"]

# Entries for the student's own loss, which the teacher would compute, too.
_LABELS = {"labels", "label", "label_ids", "next_sentence_label", "start_positions", "end_positions"}


@dataclass(frozen=True)
class _Part:
    """One loss and its recorders. `prefix` precedes the names of its components."""

    prefix: str
    loss: Loss
    student: record_qkv
    teacher: record_qkv


class RelationTerm:
    """The relation loss as a term beside another loss, computed from the models' own forwards.

    A step consists of `run_teacher(**batch)`, the student's forward through whatever wraps it, and `value(mask)`, which
    returns the loss of these two forwards. The order of the forwards does not matter. If a trainer runs the teacher
    itself, `run_teacher` is not called. If the models ran before the step, to generate text for example, call `clear()`
    first. Several forwards in one step (one for each column of sentence pairs) need one `value` each.

    The teacher is put in evaluation mode and runs without gradient; its `requires_grad` stays as it is. A teacher on
    the CPU moves to the device of its inputs; on another device it gets its inputs there. Width, dtype and layers of
    the two models may differ, but both must see the same tokens at the same positions.

    A deep copy of the term belongs to a deep copy of the student (the same one if both are copied at once) and shares
    the teacher.

    Args:
        student: the model that is trained, in its wrappers or without them; see `record_qkv`.
        teacher: the model that is imitated.
        loss: `MiniLMLoss` or `MiniLMv2Loss`. To compare some relations before and others after the rotary embedding,
            give one loss for each, of the same reduction:
            {"before": MiniLMv2Loss(48), "after": MiniLMv2Loss(12, relations={"qk": 1.0})}.
        layers: the layers to compare, teacher's to student's, counted from 1 or, if negative, from the last: {12: 6}.
            None: the layers of the loss or, if it has none, {-1: -1}.
        rotary: "before" or "after", as in `record_qkv`.
        causal: whether rows see only the keys j ≤ i. None: as in the models, so that decoders are causal and encoders
            are not. A model is causal if the `is_causal` of its config and attention modules or the `is_decoder` of its
            config say so; if it has none of them, two tokens are run to see whether the first depends on the second.
        student_projections: see `projections` of `record_qkv`.
        teacher_projections: see `projections` of `record_qkv`.

    Attributes:
        student: the student.
        teacher: the teacher.
        causal: whether rows see only the keys j ≤ i.
        reduction: the reduction of the losses.

    Raises:
        TypeError: `loss` is no such loss; see also `record_qkv`.
        ValueError: `layers` differs from the layers of the loss; two losses have different reductions; only one of the
            models is causal, or it is unknown whether; see also `record_qkv`.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from minilm_kernels import MiniLMv2Loss
        >>> from minilm_kernels.integrations import RelationTerm
        >>> sizes = dict(vocab_size=100, num_attention_heads=2, intermediate_size=48)
        >>> teacher = BertForMaskedLM(BertConfig(hidden_size=48, num_hidden_layers=4, **sizes))
        >>> student = BertForMaskedLM(BertConfig(hidden_size=24, num_hidden_layers=2, **sizes))
        >>> term = RelationTerm(student, teacher, MiniLMv2Loss(num_relation_heads=4), layers={3: 2})
        >>> batch = {"input_ids": torch.randint(100, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        >>> term.run_teacher(**batch)
        >>> masked_lm = student(**batch, labels=batch["input_ids"]).loss
        >>> (masked_lm + term.value(batch["attention_mask"])).backward()
        >>> term.causal
        False
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: Loss | Mapping[Rotary, Loss],
        layers: Mapping[int, int] | None = None,
        *,
        rotary: Rotary = "before",
        causal: bool | None = None,
        student_projections: Sequence[str] | None = None,
        teacher_projections: Sequence[str] | None = None,
    ):
        self._arguments = dict(locals())
        del self._arguments["self"]
        self.student, self.teacher = student, teacher
        losses = dict(loss) if isinstance(loss, Mapping) else {rotary: loss}
        if not losses or not all(isinstance(one, MiniLMLoss | MiniLMv2Loss) for one in losses.values()):
            raise TypeError(f"loss: expected MiniLMLoss or MiniLMv2Loss, or {{rotary: loss}}, got {loss!r}")
        if len(reductions := {one.reduction for one in losses.values()}) > 1:
            raise ValueError(f"loss: expected losses of one reduction, got {' and '.join(sorted(reductions))}")
        self.reduction = reductions.pop()
        self._parts: list[_Part] = []
        self._recorders: list[record_qkv] = []
        try:
            for kind, one in losses.items():
                one, pairs = _with_layers(one, layers)
                self._recorders.append(record_qkv(student, [*pairs.values()], kind, projections=student_projections))
                self._recorders.append(record_qkv(teacher, [*pairs], kind, projections=teacher_projections))
                prefix = f"{kind}/" if isinstance(loss, Mapping) else ""
                self._parts.append(_Part(prefix, one, *self._recorders[-2:]))
            self.causal = self._common_causal() if causal is None else causal
        except BaseException:
            self.remove()
            raise
        teacher.eval()

    def run_teacher(self, *, output: bool = False, **batch: Any) -> Any:
        """Runs the teacher without gradient, and only as far as the last recorded layer if its output is not wanted.

        Compiled teachers and those with fully_shard always run to the end.

        Args:
            output: True to run the whole teacher and return its output, for another loss.
            **batch: keyword arguments of the teacher's forward. Labels are left out, and so are entries for others
                (`token_type_ids`, `modality`, ...) that the teacher does not take. `use_cache` is False by default.

        Returns:
            The teacher's output, or None.

        Raises:
            RuntimeError: the teacher is in training mode.
            TypeError: the teacher does not take an entry, such as a misspelt `attention_mask`.
        """
        if self.teacher.training:
            raise RuntimeError("teacher: it is in training mode, in which dropout changes its relations; call eval()")
        batch = self._teacher_batch(batch)
        with torch.no_grad():
            if output:
                return self.teacher(**batch)
            with until_recorded(*(part.teacher for part in self._parts)):
                self.teacher(**batch)
        return None

    def value(self, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]) -> Tensor:
        """Returns the loss of the last forward of each model: `total(components(...))`; arguments are as there."""
        return self.total(self.components(attention_mask, **masks))

    def components(self, attention_mask: Tensor | None = None, **masks: Unpack[MaskArgs]) -> dict[str, Tensor]:
        """Returns the unweighted KL of each relation in the last forward of each model, and forgets the forwards.

        Args:
            attention_mask: (B, S), nonzero on valid tokens; see `relation_kl`.
            **masks: `query_mask` (nonzero on the rows that count, such as those of a completion), `prefix_lens`,
                `cu_seqlens` and `max_seqlen` as in `relation_kl`, and `causal`, by default that of the term. With
                `cu_seqlens`, the models have run on packed tokens, (1, T) or (T,).

        Returns:
            Scalars in the student's graph by the relation's name: "qq" or, if the loss has several layers, "12/qq" with
            the teacher's layer. With two losses, "before/" or "after/" precedes the name.

        Raises:
            RuntimeError: a model did not run since the last call, or ran more than once, and so on; see
                `record_qkv.pop`. The message says which model.
            ValueError: the models ran on different numbers of tokens; see also `relation_kl`.
        """
        masks = {"causal": self.causal, **masks}
        found = {}
        for part, (teacher, student) in zip(self._parts, self._pop(), strict=True):
            student = {layer: _placed(qkv, None, masks) for layer, qkv in student.items()}
            like = next(iter(student.values())).query
            teacher = {layer: _placed(qkv, like, masks) for layer, qkv in teacher.items()}
            if part.loss.layers is None:
                (of_teacher,), (of_student,) = teacher.values(), student.values()
                values = part.loss.components(of_teacher, of_student, attention_mask, **masks)
            else:
                values = part.loss.components(teacher, student, attention_mask, **masks)
            found.update({part.prefix + name: value for name, value in values.items()})
        return found

    def total(self, components: Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum of the values that `components` returned, which is the loss."""
        first, *others = (
            part.loss.total({name.removeprefix(part.prefix): value for name, value in components.items()})
            for part in self._parts
        )
        return sum(others, first)

    def num_items(self, attention_mask: Tensor, query_mask: Tensor | None = None) -> Tensor:
        """Returns the number of items over which the loss averages; see `MiniLMv2Loss.num_items`."""
        return self._parts[0].loss.num_items(attention_mask, query_mask)

    def student_alone(self) -> AbstractContextManager[None]:
        """Returns a context in which the student runs only as far as the last recorded layer, and returns nothing.

        It is for the relation loss alone, without a wrapper such as DistributedDataParallel around the student.
        """
        return until_recorded(*(part.student for part in self._parts))

    def clear(self) -> None:
        """Forgets the forwards of both models, such as those of generation."""
        for recorder in self._recorders:
            recorder.clear()

    def remove(self) -> None:
        """Stops recording. Both models are as they were before, except for the teacher's mode and device."""
        for recorder in self._recorders:
            recorder.remove()

    def _common_causal(self) -> bool:
        part = self._parts[0]
        student, teacher = _is_causal(part.student, "student"), _is_causal(part.teacher, "teacher")
        self.clear()
        if student != teacher:
            names = ("student", "teacher") if student else ("teacher", "student")
            raise ValueError("causal: the {} is causal and the {} is not; choose True or False".format(*names))
        return student

    def _pop(self) -> list[tuple[dict[int, QKV], dict[int, QKV]]]:
        """The teacher's and the student's recordings for each part."""
        try:
            return [(_popped("teacher", part.teacher), _popped("student", part.student)) for part in self._parts]
        except RuntimeError:
            self.clear()  # otherwise the next step would find the other recordings of this one
            raise

    def _teacher_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The entries for the teacher, on its device."""
        model = unwrap(self.teacher, runs_whole=True)
        accepted = inspect.signature(type(model).forward).parameters
        unknown = [n for n in batch if n not in accepted and n not in FOR_OTHERS and not n.startswith("output_")]
        if unknown and is_pretrained_model(model):  # many ignore what they do not know
            raise TypeError(f"batch: unknown {', '.join(unknown)}; the teacher takes {', '.join(list(accepted)[1:])}")
        batch = {n: x for n, x in batch.items() if n not in _LABELS and (n in accepted or n not in FOR_OTHERS)}
        if "use_cache" in accepted:
            batch.setdefault("use_cache", False)
        devices = [x.device for x in batch.values() if isinstance(x, Tensor)]
        place = next(model.parameters()).device
        if devices and place.type == "cpu" != devices[0].type:
            self.teacher.to(place := devices[0])
        return {name: x.to(place) if isinstance(x, Tensor) else x for name, x in batch.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "RelationTerm":
        memo[id(self.teacher)] = self.teacher
        return RelationTerm(**copy.deepcopy(self._arguments, memo))

    def __reduce__(self) -> tuple:
        return _from_arguments, (self._arguments,)


def _from_arguments(arguments: dict[str, Any]) -> RelationTerm:
    return RelationTerm(**arguments)


def _with_layers(loss: Loss, layers: Mapping[int, int] | None) -> tuple[Loss, dict[int, int]]:
    """The loss for these layers, and the layers: the teacher's to the student's."""
    if loss.layers is None:
        pairs = {-1: -1} if layers is None else dict(layers)
        return (loss if len(pairs) == 1 else loss.with_layers(pairs)), pairs
    if layers is not None and dict(layers) != loss.layers:
        raise ValueError(f"layers: expected those of the loss, {loss.layers}, or None, got {layers!r}")
    return loss, loss.layers


def _popped(model: str, recorder: record_qkv) -> dict[int, QKV]:
    try:
        return recorder.pop()
    except RuntimeError as error:
        raise RuntimeError(f"{model}: {error}") from None


def _placed(qkv: QKV, like: Tensor | None, masks: MaskArgs) -> QKV:
    """The tensors in the layout of the loss, and on the device and with the tokens of `like`."""
    if masks.get("cu_seqlens") is not None:
        qkv = QKV(*(x.flatten(0, -2) for x in qkv))
    if like is None:
        return qkv
    if qkv.query.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"teacher and student ran on tokens of shape {tuple(qkv.query.shape[:-1])} and {tuple(like.shape[:-1])}; "
            "expected the same tokens in both: the same tokenization, truncation and padding"
        )
    return QKV(*(x.to(like.device) for x in qkv))


def _is_causal(recorder: record_qkv, model: str) -> bool:
    """True if the rows of the first recorded layer see only the keys j ≤ i."""
    root, (path, _) = recorder._stack.root, next(iter(recorder._modules.values()))
    config, inner = nearest_config(root, path), path.split(".")
    modules = [root.get_submodule(".".join(inner[:end])) for end in range(1, len(inner) + 1)]
    settings = [getattr(source, "is_causal", None) for source in (config, *modules)]
    if False in settings:
        return False
    return True in settings or getattr(config, "is_decoder", False) or _ignores_later_tokens(root, model)


def _ignores_later_tokens(root: nn.Module, model: str) -> bool:
    """True if the output for the first of two tokens does not depend on the second."""
    ids = torch.tensor([[2, 2], [2, 3]], device=next(root.parameters()).device)
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        with torch.no_grad():
            first, second = root(input_ids=ids)[0].float().diff(dim=0)[0].abs().amax(-1)
    except Exception as error:
        raise ValueError(f"causal: choose True or False, it is unknown for the {model} ({error})") from error
    finally:
        for module, mode in modes:
            module.training = mode
    return bool(first < 1e-4 * second)
