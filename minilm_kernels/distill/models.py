"""Loads teacher, student and tokenizer, and refuses a pair that cannot be distilled before any work is done."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from minilm_kernels.losses import QKV, MiniLMLoss, MiniLMv2Loss
from minilm_kernels.qkv import QKVExtractor
from minilm_kernels.students import copied_student, random_student, student_config

from .batch import Batch
from .config import DistillConfig
from .loading import has_tokenizer, load_model, load_tokenizer, source_of
from .preflight import check_ids, check_weights

_DROPOUT = re.compile(r"dropout|_pdrop$")
_DROPOUT_OF_HEADS = re.compile(r"classif|summary|^qa_")


class Side:
    """One model of the pair: its projections of a batch at one layer, and how it wants its inputs."""

    def __init__(self, model: Any, layer: int, projections: Sequence[str] | None, side: str) -> None:
        self.model = model
        try:
            self.extractor = QKVExtractor(model, layer, frozen=side == "teacher", projections=projections)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--{side}-layer, --{side}-projections: {error}") from error
        self._additive = model.config._attn_implementation == "eager"
        self._offset, self.longest = position_range(model)

    def project(self, batch: Batch) -> QKV:
        """Q, K and V as the loss takes them: (B, S, hidden), or packed (T, hidden)."""
        return batch.for_loss(self.extractor(**batch.model_inputs(self._offset, self._additive)))


@dataclass(frozen=True)
class Pair:
    """What a run distils: both sides, the loss, and the tokenizer that both share."""

    teacher: Side
    student: Side
    loss: MiniLMLoss | MiniLMv2Loss
    tokenizer: Any

    def trained(self) -> dict[str, nn.Parameter]:
        """The student's parameters that the loss depends on, by name; those of a projection in no relation are not."""
        letters = set("".join(self.loss.relations))
        projections = zip("qkv", self.student.extractor.projections, strict=True)
        unused = {id(p) for letter, module in projections if letter not in letters for p in module.parameters()}
        reached = {id(parameter) for parameter in self.student.extractor.parameters()} - unused
        return {name: p for name, p in self.student.model.named_parameters() if id(p) in reached}


def load_pair(config: DistillConfig, device: torch.device) -> Pair:
    """Teacher (frozen) and student (float32, initial weights) on `device`.

    Raises:
        FileNotFoundError, ValueError: a model cannot be loaded, has not the layer asked for, or the two do not fit:
            vocabulary, relation heads, attention heads, positions.
    """
    source = source_of(config.teacher, "--teacher")
    tokenizer = load_tokenizer(source, "--teacher")
    model, info = load_model(source, "--teacher")
    teacher = Side(model.requires_grad_(False).to(device), config.teacher_layer, config.teacher_projections, "teacher")
    check_weights(teacher.extractor, info, f"--teacher {config.teacher}", teacher=True)
    torch.manual_seed(config.seed)
    model, info = _make_student(config, teacher, tokenizer)
    projections = config.student_projections or (config.teacher_projections if config.copy_layers else None)
    student = Side(model.to(device), config.student_layer, projections, "student")
    if config.student is not None:
        check_weights(student.extractor, info, f"--student {config.student}", teacher=False)
    for name, side in (("teacher", teacher), ("student", student)):
        if config.seq_len > side.longest:
            raise ValueError(f"--seq-len {config.seq_len} exceeds the {side.longest} positions of the {name}")
    check_ids(tokenizer, teacher.model, student.model)
    return Pair(teacher, student, _make_loss(config, teacher.model.config, student.model.config), tokenizer)


def position_range(model: Any) -> tuple[int, int]:
    """(position id of a sequence's first token, how many positions there are).

    RoBERTa, XLM-R and MPNet begin after their padding index, which their position embedding carries.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return offset, module.num_embeddings - offset
    return 0, getattr(model.config, "max_position_embeddings", 1 << 30)


def _make_student(config: DistillConfig, teacher: Side, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """The student on the CPU, and the loading info of `load_model`, empty for one that was not loaded."""
    info: dict[str, Any] = {}
    student: Any
    if config.student is not None:
        source = source_of(config.student, "--student")
        student, info = load_model(source, "--student")
        _check_vocabulary(config, source, tokenizer)
    elif config.copy_layers is not None:
        try:
            student = copied_student(teacher.model, config.copy_layers, projections=config.teacher_projections)
        except ValueError as error:
            raise ValueError(f"--copy-layers: {error}") from error
    else:
        assert config.student_layers is not None
        assert config.student_hidden is not None
        sizes = (config.student_layers, config.student_hidden)
        try:
            shape = student_config(teacher.model.config, *sizes, num_attention_heads=config.student_heads)
        except ValueError as error:
            raise ValueError(f"--student-layers, --student-hidden, --student-heads: {error}") from error
        student = random_student(shape, seed=config.seed)
    return (student if config.dropout is None else _with_dropout(student, config.dropout)), info


def _with_dropout(student: PreTrainedModel, dropout: float) -> PreTrainedModel:
    """The same weights under another dropout, which models read from their configuration when they are made."""
    settings = copy.deepcopy(student.config)
    names = [
        name
        for name, value in settings.to_dict().items()
        if isinstance(value, float | int) and _DROPOUT.search(name) and not _DROPOUT_OF_HEADS.search(name)
    ]
    if not names:
        raise ValueError(f"--dropout: {type(settings).__name__} has no dropout to set")
    for name in names:
        setattr(settings, name, dropout)
    changed = AutoModel.from_config(settings, dtype=torch.float32)
    changed.load_state_dict(student.state_dict())
    return changed


def _check_vocabulary(config: DistillConfig, source: str, tokenizer: Any) -> None:
    """A student's own tokenizer must give the teacher's tokens; one that comes without is held to the size."""
    if not has_tokenizer(source):
        return
    vocabulary, expected = load_tokenizer(source, "--student").get_vocab(), tokenizer.get_vocab()
    if vocabulary != expected:
        other = [word for word in expected if vocabulary.get(word) != expected[word]]
        raise ValueError(
            f"the tokenizers of --teacher {config.teacher} ({len(expected)} tokens) and --student {config.student} "
            f"({len(vocabulary)} tokens) differ, for example in {other[:3] or 'tokens of the student only'}; "
            "the two models must share a vocabulary"
        )


def _make_loss(config: DistillConfig, teacher: Any, student: Any) -> MiniLMLoss | MiniLMv2Loss:
    for side, settings in (("teacher", teacher), ("student", student)):
        for name in ("hidden_size", "num_attention_heads"):
            if not isinstance(getattr(settings, name, None), int):
                raise ValueError(f"the {side}'s {type(settings).__name__} has no {name}; give a text model")
    common: dict[str, Any] = {"reduction": config.reduction, "backend": config.backend}
    if config.method == "minilm":
        heads_t, heads_s = teacher.num_attention_heads, student.num_attention_heads
        if heads_t != heads_s:
            raise ValueError(
                f"--method minilm needs as many attention heads in the student ({heads_s}) as in the teacher "
                f"({heads_t}): choose such a student, or --method minilmv2"
            )
        return MiniLMLoss(heads_t, **common)
    widths = math.gcd(teacher.hidden_size, student.hidden_size)
    heads = config.relation_heads or (64 if teacher.hidden_size >= 1024 else 48)
    if widths % heads:
        legal = ", ".join(str(n) for n in range(1, widths + 1) if widths % n == 0)
        raise ValueError(
            f"--relation-heads {heads} does not divide the hidden sizes of teacher ({teacher.hidden_size}) and student "
            f"({student.hidden_size}); legal are {legal}"
        )
    return MiniLMv2Loss(heads, relations=config.relations, **common)
