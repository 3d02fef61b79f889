"""Loads teacher, student and tokenizer, and checks that they fit each other before any training."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModel, PreTrainedModel

from minilm_kernels.losses import QKV, MiniLMLoss, MiniLMv2Loss
from minilm_kernels.packed import use_packed_attention
from minilm_kernels.qkv import QKVExtractor
from minilm_kernels.students import copied_student, one_line, pca_student, random_student, student_config
from minilm_kernels.vocabulary import TrimmedVocabulary, restricted, trim_vocabulary

from .batch import Batch
from .config import DistillConfig
from .loading import has_tokenizer, load_model, load_tokenizer, resolve_source
from .preflight import check_ids, check_weights

_DROPOUT = re.compile(r"dropout|_pdrop$")
_DROPOUT_OF_TASK_HEADS = re.compile(r"classif|summary|^qa_")
# Float32 rounding gives less than 1e-6; in small random encoders, one of six tokens changes the others by 2e-3.
_CAUSAL_TOLERANCE = 1e-4
# Both models have a graph for each number of samples and each room for documents. Beyond the limit, compiling fails.
_GRAPHS = 64


class LayerModel:
    """A model, and the query, key and value of one of its layers for a batch.

    Args:
        model: a transformers model.
        layer: the layer, counted from 1, or from -1 backwards.
        projections: one or three names for other architectures, see `_projections`.
        role: "teacher" or "student"; a teacher is frozen.
        ids: the model's id of each of the teacher's token ids; None if both have the same vocabulary.

    Attributes:
        extractor: the `QKVExtractor`.
        max_positions: number of positions of the model.
        max_document_length: tokens of the longest document of the run.
        packed: True if the model takes packed batches as one row, without a mask.
        causal: True if a token of the model attends to earlier tokens only.
        widths: the last dimensions of query, key and value, of which grouped heads have fewer in key and value.

    Raises:
        ValueError: the layer or the projections do not exist. The message names the option.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        projections: Sequence[str] | None,
        role: Literal["teacher", "student"],
        ids: Tensor | None = None,
    ) -> None:
        self.model, self.role, self._ids = model, role, ids
        try:
            names = _projections(model, projections)
            self.extractor = QKVExtractor(model, layer, frozen=role == "teacher", projections=names)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--{role}-layer, --{role}-projections: {error}") from error
        self._offset, self.max_positions = position_range(model)
        self._takes_positions = "position_ids" in inspect.signature(type(model.base_model).forward).parameters
        self.max_document_length = self.max_positions
        self.packed = False
        self.causal = _attends_causally(model)
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
        with torch.no_grad():
            self.widths = [x.shape[-1] for x in self.extractor(input_ids=ids)]

    def use_packed_attention(self, *, bf16: bool = False) -> None:
        """Makes the model take packed batches as one row, without a mask; under bfloat16 autocast if `bf16`.

        Raises:
            ValueError: the model has no packed attention.
        """
        self.model.train(self.role == "student")
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=bf16):
            use_packed_attention(self.model)
        self.packed = True

    def project(self, batch: Batch) -> QKV:
        """Query, key and value in the layout of the loss: (B, S, hidden), or (T, hidden) for a packed batch."""
        row = self.packed and batch.packed
        if row:
            inputs = batch.row_inputs(self._offset, self.max_document_length, causal_model=self.causal)
        else:
            inputs = self._masked_inputs(batch)
        if not self._takes_positions:
            del inputs["position_ids"]
        if self._ids is not None:
            inputs["input_ids"] = self._ids[inputs["input_ids"]]
        try:
            return batch.for_loss(self.extractor(**inputs), row=row)
        except TorchDynamoException as error:
            raise ValueError(
                f"--torch-compile: the {self.role}'s {type(self.model).__name__} cannot be compiled "
                f"({one_line(error)}); train without this option"
            ) from error

    def _masked_inputs(self, batch: Batch) -> dict[str, Any]:
        config = self.model.config
        reach = None
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            # A window counts the token itself in decoders, and in encoders that are made of them (Gemma 3).
            reach = config.sliding_window - (self.causal or hasattr(config, "use_bidirectional_attention"))
        additive = config._attn_implementation == "eager"
        return batch.model_inputs(self._offset, additive, causal_model=self.causal, reach=reach)


@dataclass(frozen=True)
class TeacherStudent:
    """The teacher, the student, their loss and their tokenizers.

    Attributes:
        tokenizer: the teacher's tokenizer, which divides the text for both models.
        mask: "bidirectional", "causal" or "prefix".
        vocabulary: the student's part of the teacher's vocabulary; None if it has all of it.
        attention: a line on the attention of both models in packed batches.
    """

    teacher: LayerModel
    student: LayerModel
    loss: MiniLMLoss | MiniLMv2Loss
    tokenizer: Any
    mask: str = "bidirectional"
    vocabulary: TrimmedVocabulary | None = None
    attention: str = ""

    @property
    def max_document_length(self) -> int:
        """Tokens of the longest document."""
        return min(self.teacher.max_document_length, self.student.max_document_length)

    @property
    def student_tokenizer(self) -> Any:
        return self.tokenizer if self.vocabulary is None else self.vocabulary.tokenizer

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles both models, each as one graph.

        Every batch shape has a graph of its own. A graph of dynamic shapes would make results depend on the shapes
        that came before, so that a resumed run would have other last bits.
        """
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        for model in (self.teacher, self.student):
            model.extractor.compile(backend=backend, fullgraph=True, dynamic=False)

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


def load_models(
    config: DistillConfig,
    device: torch.device,
    texts: Iterable[str] | Mapping[int, int] = (),
    teacher_ids: Tensor | None = None,
) -> TeacherStudent:
    """Loads the frozen teacher and the float32 student with its initial weights on `device`.

    Args:
        texts: with `--trim-vocabulary`, the texts whose tokens are counted, or these counts.
        teacher_ids: the vocabulary that they have given before, for a run that is resumed.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: a model cannot be loaded or lacks the layer, or the models do not fit each other (vocabulary,
            relation heads, attention heads, positions, mask).
    """
    source = resolve_source(config.teacher, "--teacher")
    tokenizer = load_tokenizer(source, "--teacher")
    model, info = load_model(source, "--teacher")
    model = model.requires_grad_(False).to(device)
    teacher = LayerModel(model, config.teacher_layer, config.teacher_projections, "teacher")
    check_weights(teacher.extractor, info, f"--teacher {config.teacher}", teacher=True)
    torch.manual_seed(config.seed)
    model, info = _make_student(config, teacher, tokenizer)
    vocabulary, ids = None, None
    if config.trim_vocabulary is not None:
        try:
            if teacher_ids is None:
                vocabulary = trim_vocabulary(tokenizer, texts, config.trim_vocabulary)
            else:
                vocabulary = restricted(tokenizer, teacher_ids)
            model = vocabulary.trim(model)
        except ValueError as error:
            raise ValueError(f"--trim-vocabulary: {error}") from error
        ids = vocabulary.student_ids.to(device)
    if config.gradient_checkpointing:
        # transformers 5.24 has renamed the method.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise ValueError(f"--gradient-checkpointing: {error}") from error
    # The student has been made from the float32 weights. Buffers, such as frequencies of positions, keep their type.
    for parameter in teacher.model.parameters():
        parameter.data = parameter.data.to(getattr(torch, config.teacher_dtype))
    projections = config.student_projections or (config.teacher_projections if config.student is None else None)
    student = LayerModel(model.to(device), config.student_layer, projections, "student", ids)
    if config.student is not None:
        check_weights(student.extractor, info, f"--student {config.student}", teacher=False)
    sides = (teacher, student)
    for side in sides:
        if (config.max_document_length or 0) > side.max_positions:
            raise ValueError(
                f"--max-document-length {config.max_document_length} exceeds the {side.max_positions} positions of the "
                f"{side.role}"
            )
    longest = config.max_document_length or min(config.max_seq_length, *(side.max_positions for side in sides))
    for side in sides:
        side.max_document_length = longest
    check_ids(tokenizer, teacher.model, student.model if vocabulary is None else None)
    mask = config.mask
    if mask == "auto":
        if teacher.causal != student.causal:
            words = {True: "earlier tokens only", False: "all tokens"}
            raise ValueError(
                f"--mask auto: the teacher attends to {words[teacher.causal]}, the student to {words[student.causal]}; "
                "choose the mask of both"
            )
        mask = "causal" if teacher.causal else "bidirectional"
    loss = _make_loss(config, teacher, student)
    attention = _choose_attention(config, teacher, student)  # last, since the models now need borders in every call
    return TeacherStudent(teacher, student, loss, tokenizer, mask, vocabulary, attention)


def _choose_attention(config: DistillConfig, *sides: LayerModel) -> str:
    """Turns packed attention on where it is asked for and supported. Returns a line that says what was chosen."""
    if not config.packing or config.attention == "mask":
        return f"attention: {'mask' if config.packing else 'one document a row'}"
    found = []
    for side in sides:
        try:
            side.use_packed_attention(bf16=config.bf16)
            found.append(f"{side.role} packed")
        except ValueError as error:
            if config.attention == "packed":
                raise ValueError(f"--attention packed: the {side.role} cannot have it: {error}") from error
            found.append(f"{side.role} with a mask of every pair of tokens of a row ({error})")
    return f"attention: {', '.join(found)}"


def _attends_causally(model: Any) -> bool:
    """True if the outputs of the first tokens do not depend on the last one.

    They are not compared bit by bit: in a mixture of experts, the last token changes the sizes of matrix products.
    """
    training = model.training
    first = torch.tensor([[5, 6, 7, 5, 6, 7]], device=next(model.parameters()).device)
    last = first.clone()
    last[:, -1] = 5
    try:
        with torch.no_grad():
            before, after = (model.eval()(input_ids=ids).last_hidden_state[:, :-1] for ids in (first, last))
    except Exception:  # an encoder-decoder, which needs other inputs; its encoder is bidirectional
        return False
    finally:
        model.train(training)
    return bool((before - after).abs().max() <= _CAUSAL_TOLERANCE * before.abs().max())


def _projections(model: Any, names: Sequence[str] | None) -> Any:
    """The argument `projections` of `QKVExtractor`.

    Args:
        names: the names of query, key and value; or that of a fused projection with its order, such as
            "layers.{i}.attention.to_qkv:blocks"; or that of a stack. By default, the encoder of an encoder-decoder.
    """
    if names is None:
        return "encoder" if model.config.is_encoder_decoder else None
    if len(names) == 3:
        return names
    path, colon, order = names[0].partition(":")
    return {path: order} if colon else path


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
    elif config.copy_layers is not None or config.student_init == "copy":
        layers = config.student_num_hidden_layers if config.copy_layers is None else config.copy_layers
        option = "--student-num-hidden-layers" if config.copy_layers is None else "--copy-layers"
        assert layers is not None
        names = _projections(teacher.model, config.teacher_projections)
        try:
            student = copied_student(teacher.model, layers, projections=names)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from error
    else:
        assert config.student_num_hidden_layers is not None
        assert config.student_hidden_size is not None
        sizes = (config.student_num_hidden_layers, config.student_hidden_size)
        heads, key_heads = config.student_num_attention_heads, config.student_num_key_value_heads
        grouped = {} if key_heads is None else {"num_key_value_heads": key_heads}
        try:
            shape = student_config(teacher.model.config, *sizes, num_attention_heads=heads, **grouped)
        except ValueError as error:
            raise ValueError(
                "--student-num-hidden-layers, --student-hidden-size, --student-num-attention-heads, "
                f"--student-num-key-value-heads: {error}"
            ) from error
        if config.student_init == "pca":
            try:
                student = pca_student(teacher.model, shape, seed=config.seed)
            except ValueError as error:
                raise ValueError(f"--student-init pca: {error}") from error
        else:
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


def _make_loss(config: DistillConfig, teacher: LayerModel, student: LayerModel) -> MiniLMLoss | MiniLMv2Loss:
    sides = {"teacher": teacher, "student": student}
    for role, side in sides.items():
        settings = side.model.config
        for name in ("hidden_size", "num_attention_heads"):
            if not isinstance(getattr(settings, name, None), int):
                raise ValueError(f"the {role}'s {type(settings).__name__} has no {name}; give a text model")
    common: dict[str, Any] = {"reduction": config.reduction, "backend": config.backend}
    if config.method == "minilm":
        heads_t, heads_s = teacher.model.config.num_attention_heads, student.model.config.num_attention_heads
        if heads_t != heads_s:
            raise ValueError(
                f"--method minilm needs as many attention heads in the student ({heads_s}) as in the teacher "
                f"({heads_t}); choose such a student, or --method minilmv2"
            )
        return MiniLMLoss(heads_t, **common)
    heads = config.relation_heads or (64 if teacher.model.config.hidden_size >= 1024 else 48)
    letters = sorted(set("".join(config.relations)))
    widths = {role: dict(zip("qkv", side.widths, strict=True)) for role, side in sides.items()}
    divisor = math.gcd(*(widths[role][letter] for role in sides for letter in letters))
    if divisor % heads:
        valid = ", ".join(str(n) for n in range(1, divisor + 1) if divisor % n == 0)
        shown = {role: " / ".join(str(n) for n in dict.fromkeys(widths[role][x] for x in letters)) for role in sides}
        raise ValueError(
            f"--relation-heads {heads} does not divide the hidden sizes of teacher ({shown['teacher']}) and student "
            f"({shown['student']}); valid numbers are {valid}"
        )
    return MiniLMv2Loss(heads, relations=config.relations, **common)
