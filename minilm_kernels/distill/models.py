"""Loads teacher, student and tokenizer, and checks that they fit each other before any training."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from minilm_kernels.losses import QKV, MiniLMLoss, MiniLMv2Loss
from minilm_kernels.qkv import QKVExtractor
from minilm_kernels.students import copied_student, random_student, student_config

from .batch import Batch
from .config import DistillConfig
from .loading import has_tokenizer, load_model, load_tokenizer, resolve_source
from .preflight import check_ids, check_weights

_DROPOUT = re.compile(r"dropout|_pdrop$")
_DROPOUT_OF_TASK_HEADS = re.compile(r"classif|summary|^qa_")


class LayerModel:
    """A model, and the query, key and value of one of its layers for a batch.

    Args:
        model: a transformers model.
        layer: the layer, counted from 1, or from -1 backwards.
        projections: names of the query, key and value modules for other architectures, see `QKVExtractor`.
        role: "teacher" or "student"; a teacher is frozen.

    Attributes:
        extractor: the `QKVExtractor`.
        max_positions: number of positions of the model.

    Raises:
        ValueError: the layer or the projections do not exist. The message names the option.
    """

    def __init__(
        self, model: Any, layer: int, projections: Sequence[str] | None, role: Literal["teacher", "student"]
    ) -> None:
        self.model = model
        try:
            self.extractor = QKVExtractor(model, layer, frozen=role == "teacher", projections=projections)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--{role}-layer, --{role}-projections: {error}") from error
        self._additive = model.config._attn_implementation == "eager"
        self._offset, self.max_positions = position_range(model)

    def project(self, batch: Batch) -> QKV:
        """Query, key and value in the layout of the loss: (B, S, hidden), or (T, hidden) for a packed batch."""
        return batch.for_loss(self.extractor(**batch.model_inputs(self._offset, self._additive)))


@dataclass(frozen=True)
class TeacherStudent:
    """The teacher, the student, their loss, and the tokenizer that both use."""

    teacher: LayerModel
    student: LayerModel
    loss: MiniLMLoss | MiniLMv2Loss
    tokenizer: Any

    def trained(self) -> dict[str, nn.Parameter]:
        """The student's parameters on which the loss depends, by name.

        A projection that occurs in no relation is left out, unless one module projects queries, keys and values.
        """
        letters = set("".join(self.loss.relations))
        modules = self.student.extractor.projections
        projections = zip("qkv", modules, strict=True) if len(modules) == 3 else ()
        unused = {id(p) for letter, module in projections if letter not in letters for p in module.parameters()}
        reached = {id(parameter) for parameter in self.student.extractor.parameters()} - unused
        return {name: p for name, p in self.student.model.named_parameters() if id(p) in reached}


def load_models(config: DistillConfig, device: torch.device) -> TeacherStudent:
    """Loads the frozen teacher and the float32 student with its initial weights on `device`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a model cannot be loaded or lacks the layer, or the models do not fit each other (vocabulary,
            relation heads, attention heads, positions).
    """
    source = resolve_source(config.teacher, "--teacher")
    tokenizer = load_tokenizer(source, "--teacher")
    model, info = load_model(source, "--teacher")
    model = model.requires_grad_(False).to(device)
    teacher = LayerModel(model, config.teacher_layer, config.teacher_projections, "teacher")
    check_weights(teacher.extractor, info, f"--teacher {config.teacher}", teacher=True)
    torch.manual_seed(config.seed)
    model, info = _make_student(config, teacher, tokenizer)
    projections = config.student_projections or (config.teacher_projections if config.copy_layers else None)
    student = LayerModel(model.to(device), config.student_layer, projections, "student")
    if config.student is not None:
        check_weights(student.extractor, info, f"--student {config.student}", teacher=False)
    for name, side in (("teacher", teacher), ("student", student)):
        if config.max_seq_length > side.max_positions:
            raise ValueError(
                f"--max-seq-length {config.max_seq_length} exceeds the {side.max_positions} positions of the {name}"
            )
    check_ids(tokenizer, teacher.model, student.model)
    return TeacherStudent(teacher, student, _make_loss(config, teacher.model.config, student.model.config), tokenizer)


def position_range(model: Any) -> tuple[int, int]:
    """Returns (position id of a sequence's first token, number of positions).

    In RoBERTa, XLM-R and MPNet, the position embedding has a padding index, and the positions begin after it.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return offset, module.num_embeddings - offset
    return 0, getattr(model.config, "max_position_embeddings", 1 << 30)


def _make_student(config: DistillConfig, teacher: LayerModel, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the student on the CPU, and the loading info of `load_model`; it is empty for a new student."""
    info: dict[str, Any] = {}
    student: Any
    if config.student is not None:
        source = resolve_source(config.student, "--student")
        student, info = load_model(source, "--student")
        _check_vocabulary(config, source, tokenizer)
    elif config.copy_layers is not None:
        try:
            student = copied_student(teacher.model, config.copy_layers, projections=config.teacher_projections)
        except ValueError as error:
            raise ValueError(f"--copy-layers: {error}") from error
    else:
        assert config.student_num_hidden_layers is not None
        assert config.student_hidden_size is not None
        sizes = (config.student_num_hidden_layers, config.student_hidden_size)
        heads = config.student_num_attention_heads
        try:
            shape = student_config(teacher.model.config, *sizes, num_attention_heads=heads)
        except ValueError as error:
            raise ValueError(
                f"--student-num-hidden-layers, --student-hidden-size, --student-num-attention-heads: {error}"
            ) from error
        student = random_student(shape, seed=config.seed)
    return (student if config.dropout is None else _with_dropout(student, config.dropout)), info


def _with_dropout(student: PreTrainedModel, dropout: float) -> PreTrainedModel:
    """Creates the model again with another dropout, because models read their dropout only when they are created."""
    settings = copy.deepcopy(student.config)
    names = [
        name
        for name, value in settings.to_dict().items()
        if isinstance(value, float | int) and _DROPOUT.search(name) and not _DROPOUT_OF_TASK_HEADS.search(name)
    ]
    if not names:
        raise ValueError(f"--dropout: {type(settings).__name__} has no dropout to set")
    for name in names:
        setattr(settings, name, dropout)
    changed = AutoModel.from_config(settings, dtype=torch.float32)
    changed.load_state_dict(student.state_dict())
    return changed


def _check_vocabulary(config: DistillConfig, source: str, tokenizer: Any) -> None:
    """Raises `ValueError` if the student has a tokenizer with another vocabulary than the teacher's.

    `check_ids` compares sizes where the student has no tokenizer.
    """
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
    for role, settings in (("teacher", teacher), ("student", student)):
        for name in ("hidden_size", "num_attention_heads"):
            if not isinstance(getattr(settings, name, None), int):
                raise ValueError(f"the {role}'s {type(settings).__name__} has no {name}; give a text model")
    common: dict[str, Any] = {"reduction": config.reduction, "backend": config.backend}
    if config.method == "minilm":
        heads_t, heads_s = teacher.num_attention_heads, student.num_attention_heads
        if heads_t != heads_s:
            raise ValueError(
                f"--method minilm needs as many attention heads in the student ({heads_s}) as in the teacher "
                f"({heads_t}); choose such a student, or --method minilmv2"
            )
        return MiniLMLoss(heads_t, **common)
    widths = math.gcd(teacher.hidden_size, student.hidden_size)
    heads = config.relation_heads or (64 if teacher.hidden_size >= 1024 else 48)
    if widths % heads:
        valid = ", ".join(str(n) for n in range(1, widths + 1) if widths % n == 0)
        raise ValueError(
            f"--relation-heads {heads} does not divide the hidden sizes of teacher ({teacher.hidden_size}) and student "
            f"({student.hidden_size}); valid numbers are {valid}"
        )
    return MiniLMv2Loss(heads, relations=config.relations, **common)
