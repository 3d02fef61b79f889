"""Loads teacher, student and tokenizer, and refuses a pair that cannot be distilled before any work is done."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from minilm_kernels.losses import QKV, MiniLMLoss, MiniLMv2Loss
from minilm_kernels.qkv import QKVExtractor
from minilm_kernels.students import copied_student, random_student, student_config

from .batch import Batch
from .config import DistillConfig

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")


class Side:
    """One model of the pair: its projections of a batch at one layer, and how it wants its inputs."""

    def __init__(self, model: Any, layer: int, projections: Sequence[str] | None, side: str) -> None:
        self.model = model
        try:
            self.extractor = QKVExtractor(model, layer, frozen=side == "teacher", projections=projections)
        except ValueError as error:
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
    tokenizer = _load(AutoTokenizer, config.teacher, "--teacher", "tokenizer")
    teacher = _load_model(config.teacher, "--teacher")
    torch.manual_seed(config.seed)
    student = _make_student(config, teacher, tokenizer)
    pair = Pair(
        Side(teacher.requires_grad_(False).to(device), config.teacher_layer, config.teacher_projections, "teacher"),
        Side(student.to(device), config.student_layer, config.student_projections, "student"),
        _make_loss(config, teacher.config, student.config),
        tokenizer,
    )
    for name, side in (("teacher", pair.teacher), ("student", pair.student)):
        if config.seq_len > side.longest:
            raise ValueError(f"--seq-len {config.seq_len} exceeds the {side.longest} positions of the {name}")
        words = side.model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > words:
            raise ValueError(f"the teacher's tokenizer has {len(tokenizer)} tokens, the {name} only {words}")
    return pair


def position_range(model: Any) -> tuple[int, int]:
    """(position id of a sequence's first token, how many positions there are).

    RoBERTa, XLM-R and MPNet begin after their padding index, which their position embedding carries.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            return offset, module.num_embeddings - offset
    return 0, getattr(model.config, "max_position_embeddings", 1 << 30)


def _load_model(name: str, option: str) -> Any:
    return _load(AutoModel, name, option, "model", use_safetensors=True, dtype=torch.float32)


def _load(kind: Any, name: str, option: str, what: str, **arguments: Any) -> Any:
    path = Path(name).expanduser()
    if not path.exists() and (name.count("/") != 1 or name.startswith((".", "/", "~"))) and "/" in name:
        raise FileNotFoundError(f"{option}: there is no folder {name}")
    if path.is_file():
        raise ValueError(f"{option}: {name} is a file; give the folder that holds the model and its tokenizer")
    try:
        return kind.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False, **arguments)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        where = "folder" if path.exists() else "hub name (there is no such folder here)"
        wanted = " as safetensors" if what == "model" else ""
        raise ValueError(f"{option}: no {what}{wanted} could be loaded from the {where} {name}: {error}") from error


def _make_student(config: DistillConfig, teacher: PreTrainedModel, tokenizer: Any) -> Any:
    if config.student is not None:
        student = _load_model(config.student, "--student")
        _check_vocabulary(config, student, tokenizer)
    elif config.copy_layers is not None:
        try:
            student = copied_student(teacher, config.copy_layers)
        except ValueError as error:
            raise ValueError(f"--copy-layers: {error}") from error
    else:
        assert config.student_layers is not None
        assert config.student_hidden is not None
        sizes = (config.student_layers, config.student_hidden)
        shape = student_config(teacher.config, *sizes, num_attention_heads=config.student_heads)
        student = random_student(shape, seed=config.seed)
    return student if config.dropout is None else _with_dropout(student, config.dropout)


def _with_dropout(student: Any, dropout: float) -> Any:
    """The same weights under another dropout, which models read from their configuration when they are made."""
    settings = copy.deepcopy(student.config)
    for name in _DROPOUTS:
        if hasattr(settings, name):
            setattr(settings, name, dropout)
    changed = AutoModel.from_config(settings, dtype=torch.float32)
    changed.load_state_dict(student.state_dict())
    return changed


def _check_vocabulary(config: DistillConfig, student: PreTrainedModel, tokenizer: Any) -> None:
    """A student's own tokenizer must give the teacher's tokens; one that comes without is held to the size."""
    assert config.student is not None
    try:
        own = AutoTokenizer.from_pretrained(str(Path(config.student).expanduser()), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        own = None
    if own is not None:
        vocabulary, expected = own.get_vocab(), tokenizer.get_vocab()
        if vocabulary != expected:
            other = [word for word in expected if vocabulary.get(word) != expected[word]]
            raise ValueError(
                f"the tokenizers of --teacher {config.teacher} ({len(expected)} tokens) and --student {config.student} "
                f"({len(vocabulary)} tokens) differ, for example in {other[:3] or 'tokens of the student only'}; "
                "the two models must share a vocabulary"
            )


def _make_loss(config: DistillConfig, teacher: Any, student: Any) -> MiniLMLoss | MiniLMv2Loss:
    common = {"reduction": config.reduction, "backend": config.backend}
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
