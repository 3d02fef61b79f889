"""Students: their configs, their initialisation, and the students of the two papers as presets."""

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from minilm_kernels.qkv import layer_path, resolve_layer

__all__ = [
    "PRESETS",
    "Preset",
    "copied_student",
    "parameter_count",
    "preset_config",
    "random_student",
    "student_config",
]


def student_config(
    teacher_config: PreTrainedConfig,
    num_hidden_layers: int,
    hidden_size: int,
    *,
    num_attention_heads: int = 12,
    intermediate_size: int | None = None,
    **overrides: Any,
) -> PreTrainedConfig:
    """The config of a student: the teacher's, with other layers and widths. The teacher's config stays as it is.

    Type, vocabulary, maximal positions, dropout and everything else are the teacher's. ELECTRA's embedding size follows
    the hidden size where it does so in the teacher, and is the teacher's otherwise.

    Args:
        teacher_config: a config that has hidden and intermediate sizes, layers and attention heads, under the names of
            its own type (DistilBERT: `dim`, `hidden_dim`, `n_layers`, `n_heads`).
        num_hidden_layers: layers of the student.
        hidden_size: hidden size of the student, a multiple of `num_attention_heads`.
        num_attention_heads: as many as the teacher's for MiniLM; any number for MiniLMv2. The papers' students have 12.
        intermediate_size: width of the feed-forward layers, by default 4 x `hidden_size`.
        overrides: further attributes of the config, such as `hidden_dropout_prob=0.0`.

    Raises:
        TypeError: `teacher_config` is no config, or a size is no integer.
        ValueError: a size below 1, heads that do not divide the hidden size (the message lists those that do), or an
            override that this type of config does not know.
    """
    if not isinstance(teacher_config, PreTrainedConfig):
        hint = "; give model.config" if hasattr(teacher_config, "config") else ""
        raise TypeError(f"teacher_config: expected a PreTrainedConfig, got {type(teacher_config).__name__}{hint}")
    sizes = {
        "num_hidden_layers": num_hidden_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": 4 * hidden_size if intermediate_size is None else intermediate_size,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name}={size}: expected 1 or more")
    if hidden_size % num_attention_heads:
        legal = ", ".join(str(heads) for heads in range(1, hidden_size + 1) if hidden_size % heads == 0)
        raise ValueError(
            f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}; these do: {legal}"
        )
    config: Any = copy.deepcopy(teacher_config)
    if hasattr(config, "hidden_dim"):  # DistilBERT: the one size without an alias
        sizes["hidden_dim"] = sizes.pop("intermediate_size")
    if getattr(config, "embedding_size", None) == config.hidden_size:
        sizes["embedding_size"] = hidden_size
    for name, value in (sizes | overrides).items():
        if not hasattr(config, name):
            close = difflib.get_close_matches(name, list(config.to_dict()), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{name}: {type(config).__name__} has no such attribute{hint}")
        setattr(config, name, value)
    config.name_or_path = ""
    return config


def random_student(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A base model of the config with the random initialisation of its type, in float32 on the CPU.

    Equal seeds give equal weights; no global random state is changed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        return AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)  # it writes into the config


def copied_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A student of some of the teacher's layers, in float32 on the CPU: its embeddings and pooler are copied too.

    Training the student does not change the teacher. A pooler that the teacher lacks gets the initialisation of
    `random_student(config, seed=0)`; a task head of the teacher is left out.

    Args:
        teacher: a BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA or MPNet, with or without a task head.
        layers: the teacher's layer for each of the student's, 1-based, negative counted from the last: `[1, 3, 5]`.

    Raises:
        TypeError: `teacher` is no transformers model, or a layer no integer.
        ValueError: another architecture, no layers, or one that the teacher does not have.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: expected a transformers model, got {type(teacher).__name__}")
    base = teacher.base_model
    path = layer_path(base)
    count = len(base.get_submodule(path)._modules)
    sources = [resolve_layer(layer, count) - 1 for layer in layers]
    if not sources:
        raise ValueError(f"layers: expected at least one of the teacher's layers, 1 to {count}")

    config: Any = copy.deepcopy(base.config)
    config.num_hidden_layers = len(sources)
    config.name_or_path = ""
    student = random_student(config)
    given = base.state_dict()
    layer_index = re.compile(rf"(?<=^{re.escape(path)}\.)\d+")
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            source = layer_index.sub(lambda index: str(sources[int(index[0])]), name)
            if source in given:
                tensor.copy_(given[source])
    return student


@dataclass(frozen=True)
class Preset:
    """A published student and how it was distilled. None: the papers' figure is not known here."""

    method: str  # "minilm" or "minilmv2"
    teacher: str  # "assistant": a 12 x 384 model that a base model was distilled into before
    family: str  # model type, which also gives the vocabulary
    teacher_layers: int
    teacher_layer: int  # 1-based: the layer that is distilled
    relation_heads: int  # for MiniLM the attention heads
    num_hidden_layers: int
    hidden_size: int
    million_parameters: int | None  # as published; `parameter_count` says what it counts
    speedup: float  # of inference, over a 12 x 768 base model, as published for these layers and this hidden size


# Of the published checkpoints, what a student inherits. Max positions of RoBERTa and XLM-R include the padding offset.
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": 30522, "max_position_embeddings": 512},
    "roberta": {"vocab_size": 50265, **_ROBERTA},
    "xlm-roberta": {"vocab_size": 250002, **_ROBERTA},
}
_SPEEDUP = {(6, 768): 2.0, (12, 384): 2.7, (6, 384): 5.3, (4, 384): 7.8, (3, 384): 10.1}
_MILLIONS = {
    "bert": {(6, 768): 66, (12, 384): 33, (6, 384): 22},
    "roberta": {(6, 768): 81, (12, 384): 41, (6, 384): 30},
    "xlm-roberta": {(12, 384): 117, (6, 384): 107},
}
# Method, teacher, family, its layers, the distilled one, relation heads, (layers, hidden size) of the students.
_PUBLISHED: list[tuple[str, str, str, int, int, int, list[tuple[int, int]]]] = [
    ("minilm", "bert-base", "bert", 12, 12, 12, [(6, 768), (6, 384), (4, 384), (3, 384)]),
    ("minilm", "in-house-base", "bert", 12, 12, 12, [(12, 384)]),
    ("minilm", "assistant", "bert", 12, 12, 12, [(6, 384)]),
    ("minilm", "xlm-roberta-base", "xlm-roberta", 12, 12, 12, [(12, 384)]),
    ("minilmv2", "bert-base", "bert", 12, 12, 48, [(6, 768), (6, 384)]),
    ("minilmv2", "bert-large", "bert", 24, 21, 64, [(6, 768), (6, 384)]),
    ("minilmv2", "roberta-large", "roberta", 24, 19, 64, [(6, 768), (12, 384), (6, 384)]),
    ("minilmv2", "xlm-roberta-large", "xlm-roberta", 24, 19, 64, [(12, 384), (6, 384)]),
]


def _presets() -> dict[str, Preset]:
    presets = {}
    for method, teacher, family, depth, layer, heads, shapes in _PUBLISHED:
        for shape in shapes:
            name = f"{method}-l{shape[0]}-h{shape[1]}-{teacher}"
            figures = _MILLIONS[family].get(shape), _SPEEDUP[shape]
            presets[name] = Preset(method, teacher, family, depth, layer, heads, *shape, *figures)
    return presets


PRESETS: dict[str, Preset] = _presets()
"""The papers' students by name, such as "minilmv2-l6-h384-roberta-large"."""


def preset_config(name: str) -> PreTrainedConfig:
    """The config of a published student, made without any download: 12 attention heads, intermediate size 4 x hidden.

    Raises:
        ValueError: no such preset; the message lists the names.
    """
    if name not in PRESETS:
        raise ValueError(f"name={name!r}: no such preset; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    family = AutoConfig.for_model(preset.family, **_FAMILIES[preset.family])
    return student_config(family, preset.num_hidden_layers, preset.hidden_size)


def parameter_count(config: PreTrainedConfig) -> int:
    """The number of parameters in the word embeddings and the Transformer layers of a model with this config.

    The other embeddings (positions, token types, their LayerNorm) and the pooler are not counted: counted so, every
    preset rounds to the papers' figure in millions. Counted whole without the pooler, 6 x 384 with BERT's and 6 x 768
    with RoBERTa's vocabulary have 22.57 and 81.53 million, where 22 and 81 are published. Nothing is allocated.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config))
    counted = [model.get_input_embeddings(), model.get_submodule(layer_path(model))]
    return sum(p.numel() for module in counted for p in module.parameters())
