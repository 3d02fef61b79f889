"""Students: their configs, their initialisation, and the students of the two papers as presets."""

import contextlib
import copy
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

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

# The width of the feed-forward layers, by the names that configs give it.
_INTERMEDIATE = ("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size", "d_ff", "d_inner", "n_inner")
# Settings that follow the sizes where they agree with them in the teacher, by the ends of their names.
_HEAD_WIDTH = re.compile(r"head_(dim|size)$|^d_(kv|head)$|^kv_channels$")
_KEY_HEADS = re.compile(r"(key_value|kv)_heads?$|num_query_groups$")
_HEADS = re.compile(rf"attention_heads$|{_KEY_HEADS.pattern}")
_WIDTH = re.compile(r"(embed|embedding|proj|lru|model|attention|hidden)_?(size|dim|width)$")
_PLACE = re.compile(r"(idx|index|_id|number)$|^training$")
_NOT_PER_LAYER = frozenset(PreTrainedConfig().to_dict()) | {"languages"}


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

    Type, vocabulary, maximal positions, dropout and everything else are the teacher's, except for what depends on the
    sizes. Settings with an entry for each layer (`layer_types`, ...) get the student's depth: a pattern that repeats
    goes on, other entries are taken evenly. Head width, key heads and embedding size follow where they were hidden size
    over heads, the heads and the hidden size in the teacher. The model is built without memory, to see that it can be.

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
        ValueError: a size below 1, heads that do not divide the hidden size or key heads that do not divide the heads
            (the message lists those that do), an override that this type of config does not know, a config of several
            models or of an encoder and a decoder, or sizes with which a model of this type cannot be built or run.
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
        raise ValueError(
            f"num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}; these do: "
            f"{_divisors(hidden_size)}"
        )
    _check_single_stack(teacher_config)
    for name in overrides:
        if not hasattr(teacher_config, name):
            close = difflib.get_close_matches(name, list(teacher_config.to_dict()), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"{name}: {type(teacher_config).__name__} has no such attribute{hint}")
    own = _own_names(teacher_config, sizes, intermediate_size is not None)
    overrides = {teacher_config.attribute_map.get(name, name): value for name, value in overrides.items()}
    try:
        config = _resized(teacher_config, own, overrides)
    except Exception as error:  # the classes check themselves with errors of their own
        raise ValueError(f"no {type(teacher_config).__name__} has these sizes: {one_line(error)}") from error
    for name in sizes.keys() - {"intermediate_size"}:
        if getattr(config, name) != overrides.get(config.attribute_map.get(name, name), sizes[name]):
            raise ValueError(
                f"{name}={sizes[name]}: {type(config).__name__} makes {getattr(config, name)} of it; change its config"
            )
    _check_student(config, teacher_config)
    return config


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def one_line(error: BaseException) -> str:
    """What an exception of another library says, short, with its class where that is needed to understand it."""
    text = " ".join(str(error).split())
    named = (
        text if text and isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {text}"
    )
    return named if len(named) <= 400 else f"{named[:400]}..."


def _check_single_stack(config: Any) -> None:
    """Refuses configs whose layers and widths do not describe one stack of layers."""
    kind = type(config).__name__
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if parts:
        raise ValueError(f"teacher_config: {kind} is made of {', '.join(parts)}; give the one of its text model")
    if config.is_encoder_decoder:
        raise ValueError(
            f"teacher_config.is_encoder_decoder: {kind} describes an encoder and a decoder, a student is one stack"
        )
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("teacher_config.per_layer_config: layers with settings of their own cannot be resized")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        size = getattr(config, name, None)
        if not isinstance(size, int):
            found = "has no such attribute" if size is None else f"has {size!r}, expected an int"
            raise ValueError(f"{name}: {kind} {found}")


def _own_names(config: Any, sizes: dict[str, int], intermediate_given: bool) -> dict[str, Any]:
    """The sizes under the names of the config's own type."""
    own: dict[str, Any] = dict(sizes)
    intermediate = own.pop("intermediate_size")
    names = [name for name in _INTERMEDIATE if hasattr(config, name)]
    if names:
        listed = isinstance(getattr(config, names[0]), (list, tuple))
        own[names[0]] = [intermediate] * sizes["num_hidden_layers"] if listed else intermediate
    elif intermediate_given:
        raise ValueError(f"intermediate_size: {type(config).__name__} has no such attribute")
    return {config.attribute_map.get(name, name): size for name, size in own.items()}


def _resized(teacher: Any, sizes: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """The teacher's config with other sizes and everything that depends on them.

    Settings that the class derives from the sizes (kinds of layers, head width) are derived anew: the student is built
    from the fewest settings that give the teacher. Settings that the class does not change are resized by their value.
    """

    def made(settings: dict[str, Any]) -> Any:
        return type(teacher).from_dict(copy.deepcopy(settings), attn_implementation=teacher._attn_implementation)

    before = teacher.to_dict()
    own = {name: before[name] for name in sizes if name in before}
    kept = {name: value for name, value in before.items() if name not in sizes}
    if made(before).to_dict() == before:
        for name in [name for name, value in kept.items() if isinstance(value, (int, list, dict))]:
            fewer = {key: value for key, value in kept.items() if key != name}
            with contextlib.suppress(Exception):  # a setting that the class cannot do without
                if made(fewer | own).to_dict() == before:
                    kept = fewer
    basic = [
        teacher.attribute_map.get(name, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    ]
    old, new = [before[name] for name in basic], [sizes[name] for name in basic]
    resized = {name: _resize(name, value, old, new) for name, value in before.items() if name not in sizes}
    given = {name: resized[name] for name in kept} | sizes | overrides
    derived = made(given).to_dict()
    given |= {
        name: value
        for name, value in resized.items()
        if name not in given and value != before[name] and derived.get(name) == before[name]
    }
    config = made(given)
    config.name_or_path = ""
    return config


def _resize(name: str, value: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """One setting of a teacher of (layers, hidden size, heads) `old` for a student of `new`."""
    (depth, width, heads), (new_depth, new_width, new_heads) = old, new
    if isinstance(value, int) and not isinstance(value, bool):
        if _HEAD_WIDTH.search(name) and value == width // heads:
            return new_width // new_heads
        if _HEADS.search(name) and value == heads:
            return new_heads
        if _WIDTH.search(name) and value == width:
            return new_width
        if name.endswith("layers") and value == depth:
            return new_depth
    return _Pick(depth, lambda values: _per_layer(values, new_depth))(name, value)


@dataclass(frozen=True)
class _Pick:
    """Applies `choose` to what a setting holds for each of `depth` layers; returns other settings as they are."""

    depth: int
    choose: Callable[[Sequence[Any]], list[Any]]

    def __call__(self, name: str, value: Any) -> Any:
        layers = range(self.depth)
        if not value or name in _NOT_PER_LAYER or name.endswith(("_token_id", "_token_ids")):
            return value
        if isinstance(value, dict):
            entries = {str(key): entry for key, entry in value.items()}
            if entries.keys() == {str(layer) for layer in layers}:
                return dict(enumerate(self.choose([entries[str(layer)] for layer in layers])))
        elif isinstance(value, (list, tuple)):
            if len(value) == self.depth:
                return self.choose(value)
            if all(isinstance(run, (list, tuple)) and list(map(type, run)) == [list, int] for run in value):
                kinds = [kind for pattern, times in value for kind in pattern * times]  # as [[["global", "local"], 12]]
                return [[self.choose(kinds), 1]] if len(kinds) == self.depth else value
            if "layer" in name and all(type(layer) is int and layer in layers for layer in value):
                chosen = self.choose([layer in value for layer in layers])
                return [layer for layer, is_chosen in enumerate(chosen) if is_chosen]
        return value


def _per_layer(values: Sequence[Any], count: int) -> list[Any]:
    """Entries for `count` layers: a pattern that repeats goes on, others are taken evenly from first to last."""
    length = len(values)
    for period in range(1, length // 2 + 1):
        if all(values[i] == values[i % period] for i in range(length)):
            return [values[i % period] for i in range(count)]
    return [values[round(i * (length - 1) / (count - 1)) if count > 1 else length - 1] for i in range(count)]


def _check_student(config: Any, teacher_config: Any) -> None:
    """A `ValueError` for sizes with which the model could not be built, run or saved."""
    heads = config.num_attention_heads
    for name, value in config.to_dict().items():
        own = _KEY_HEADS.search(name) and name.startswith(("num_", "n_"))  # not those of another kind of layer
        if own and isinstance(value, int) and (value < 1 or heads % value):
            raise ValueError(
                f"{name}={value} does not divide num_attention_heads={heads}; give {name} too, "
                f"one of {_divisors(heads)}"
            )
    try:
        config.validate()  # as saving does
        if type(config) not in MODEL_MAPPING:
            return
        failure = _failed_forward(_without_memory(config))
        if failure is not None:  # it may have needed a value, and there are none without memory
            failure = _failed_forward(random_student(config))
    except Exception as error:
        raise ValueError(f"{_described(config)} cannot be built: {one_line(error)}") from error
    if failure is None:
        return
    try:
        expected = _failed_forward(_without_memory(teacher_config))
    except Exception as error:
        expected = error
    if str(failure) != str(expected):  # a model that takes more than tokens fails with the teacher's sizes too
        raise ValueError(f"{_described(config)} cannot run: {one_line(failure)}") from failure


def _described(config: Any) -> str:
    sizes = ", ".join(
        f"{name}={getattr(config, name)}" for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    return f"a {type(config).__name__} of {sizes}"


def _without_memory(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(copy.deepcopy(config))


def _failed_forward(model: PreTrainedModel) -> Exception | None:
    """What keeps the model from running over a few tokens."""
    try:
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))
    except Exception as error:
        return error
    return None


def random_student(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A base model of the config with the random initialisation of its type, in float32 on the CPU.

    Equal seeds give equal weights; no global random state is changed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        return AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)  # it writes into the config


def copied_student(
    teacher: PreTrainedModel, layers: Sequence[int], *, projections: Sequence[str] | None = None
) -> PreTrainedModel:
    """A student of some of the teacher's layers, in float32 on the CPU: its embeddings and pooler are copied too.

    Training the student does not change the teacher. A pooler that the teacher lacks gets the initialisation of
    `random_student(config, seed=0)`; a task head of the teacher is left out.

    Args:
        teacher: a model of an architecture that `QKVExtractor` knows, with or without a task head, or any other whose
            layers are one list, with `projections`.
        layers: the teacher's layer for each of the student's, 1-based, negative counted from the last: `[1, 3, 5]`.
        projections: for other models, the names of the teacher's projections as `QKVExtractor` takes them.

    Raises:
        TypeError: `teacher` is no transformers model, or a layer no integer.
        ValueError: an unknown architecture without `projections`, no layers, one that the teacher does not have, or one
            that cannot stand where it would come to stand in the student.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: expected a transformers model, got {type(teacher).__name__}")
    base = teacher.base_model
    path = layer_path(base, projections)
    count = len(base.get_submodule(path)._modules)
    sources = [resolve_layer(layer, count) - 1 for layer in layers]
    if not sources:
        raise ValueError(f"layers: expected at least one of the teacher's layers, 1 to {count}")

    student = random_student(_picked_config(base.config, sources, count))
    kept = student.get_submodule(path)._modules if path in dict(student.named_modules()) else {}
    if len(kept) != len(sources):
        raise ValueError(f"teacher: {type(student).__name__}.{path} has {len(kept)} layers, expected {len(sources)}")
    whole = _without_memory(base.config)
    for position, source in enumerate(sources):
        _check_same_layer(student, whole, f"{path}.{position}", f"{path}.{source}")
    given = base.state_dict()
    layer_index = re.compile(rf"(?<=^{re.escape(path)}\.)\d+")
    with torch.no_grad():
        for name, tensor in student.state_dict().items():
            source_name = layer_index.sub(lambda index: str(sources[int(index[0])]), name)
            if source_name in given:
                tensor.copy_(given[source_name])
            elif name.startswith(f"{path}."):
                raise ValueError(f"teacher: it has no {source_name}; merge adapters and undo other changes first")
    return student


def _picked_config(teacher_config: Any, sources: Sequence[int], count: int) -> Any:
    """The teacher's config with the entries of the layers at `sources` (from 0) of its `count` layers."""
    kind = type(teacher_config).__name__
    if getattr(teacher_config, "is_heterogeneous", False):
        raise ValueError(f"teacher: {kind} has a per_layer_config, whose layers cannot be picked")
    if getattr(teacher_config, "num_hidden_layers", None) != count:
        found = getattr(teacher_config, "num_hidden_layers", "no")
        raise ValueError(f"teacher: {kind} says {found} num_hidden_layers, its list of layers has {count}")
    before = teacher_config.to_dict()
    pick = _Pick(count, lambda values: [values[source] for source in sources])
    settings = {name: pick(name, value) for name, value in before.items()}
    settings[teacher_config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(sources)
    try:
        config = type(teacher_config).from_dict(settings, attn_implementation=teacher_config._attn_implementation)
        config.validate()
    except Exception as error:  # the classes check themselves with errors of their own
        raise ValueError(f"no {kind} has these layers: {one_line(error)}") from error
    config.name_or_path = ""
    return config


def _check_same_layer(student: Any, teacher: Any, at: str, source: str) -> None:
    """A `ValueError` if the student's layer `at` computes something else than the teacher's layer `source`."""
    mine, theirs = (
        {name: _plain_settings(module) for name, module in model.get_submodule(path).named_modules()}
        for model, path in ((student, at), (teacher, source))
    )
    different = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
    if different:
        raise ValueError(
            f"layers: the teacher's {source} cannot become the student's {at}: they differ in "
            f"{', '.join(name or 'their own settings' for name in sorted(different)[:3])}"
        )


def _plain_settings(module: torch.nn.Module) -> dict[str, Any]:
    """Class, tensors and what a module keeps of its config (window, kind of attention, ...), without its place."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (str, int, float)) and not name.startswith("_") and not _PLACE.search(name)
    }
    return {"class": type(module), **shapes, **settings}


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
    model = _without_memory(config)
    counted = [model.get_input_embeddings(), model.get_submodule(layer_path(model))]
    return sum(p.numel() for module in counted for p in module.parameters())
