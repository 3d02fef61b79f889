"""Student models: configs, initialization, and the configs of the published students."""

import contextlib
import copy
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minilm_kernels._architectures import find_stack, layer_path, resolve_layer
from minilm_kernels._extras import optional_imports
from minilm_kernels.presets import PRESETS

with optional_imports("hf", "minilm_kernels.students"):
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

__all__ = [
    "copied_student",
    "parameter_count",
    "pca_student",
    "preset_config",
    "random_student",
    "student_config",
]

# Names of the width of the feed-forward layers in configs.
_INTERMEDIATE = [
    *("intermediate_size", "hidden_dim", "ffn_dim", "ffn_hidden_size", "d_ff", "d_inner", "n_inner"),
    *("encoder_ffn_dim", "decoder_ffn_dim"),
]
# T5's first layer of a stack has the position bias of all of them.
_SHARED_BY_LAYERS = re.compile("relative_attention_bias")
# Patterns for the names of settings that change with a size, if they are equal to this size in the teacher.
_HEAD_WIDTH = re.compile(r"head_(dim|size)$|^d_(kv|head)$|^kv_channels$")
_KEY_HEADS = re.compile(r"(key_value|kv)_heads?$|num_query_groups$")
_HEADS = re.compile(rf"attention_heads$|{_KEY_HEADS.pattern}")
_WIDTH = re.compile(r"(embed|embedding|proj|lru|model|attention|hidden)_?(size|dim|width)$")
_POSITION = re.compile(rf"(idx|index|_id|number)$|^training$|{_SHARED_BY_LAYERS.pattern}")
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
    """Creates the config of a student from the teacher's config and other sizes.

    Type, vocabulary, number of positions, dropout and all other settings are those of the teacher, except for settings
    that depend on the sizes. Settings with an entry per layer (`layer_types`, ...) are adapted to the student's depth:
    a repeating pattern is continued, other entries are selected evenly. Head width, number of key heads and embedding
    size follow the sizes if the teacher's do. The model is built and run on the meta device to verify the config. The
    teacher's config is not changed.

    Args:
        teacher_config: config of the teacher. Sizes may have the names of its type (DistilBERT: `dim`, `n_layers`).
        num_hidden_layers: number of layers of the student.
        hidden_size: hidden size of the student, a multiple of `num_attention_heads`.
        num_attention_heads: number of attention heads. MiniLM requires the same number as in the teacher; MiniLMv2
            allows any number. The papers' students have 12.
        intermediate_size: width of the feed-forward layers, by default 4 * `hidden_size`.
        overrides: other attributes of the config, such as `hidden_dropout_prob=0.0`.

    Returns:
        A config of the same class.

    Raises:
        TypeError: `teacher_config` is not a config, or a size is not an integer.
        ValueError: a size is below 1; the number of heads does not divide the hidden size, or the number of key heads
            does not divide that of heads (the message lists valid numbers); the config has no attribute with the name
            of an override; the config is that of several models; or a model with these sizes
            cannot be built or run.

    Example:
        >>> from transformers import BertConfig
        >>> from minilm_kernels import student_config
        >>> config = student_config(BertConfig(), num_hidden_layers=6, hidden_size=384)
        >>> config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
        (6, 384, 1536, 30522)
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
    except Exception as error:  # config classes raise exceptions of their own
        raise ValueError(f"no {type(teacher_config).__name__} has these sizes: {one_line(error)}") from error
    for name in sizes.keys() - {"intermediate_size"}:
        if getattr(config, name) != overrides.get(config.attribute_map.get(name, name), sizes[name]):
            raise ValueError(
                f"{name}={sizes[name]}: {type(config).__name__} changes it to {getattr(config, name)}; use another size"
            )
    _check_student(config, teacher_config)
    return config


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def one_line(error: BaseException) -> str:
    """The message of an exception, shortened to one line, with its class if the message alone may be unclear."""
    text = " ".join(str(error).split())
    named = (
        text if text and isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {text}"
    )
    return named if len(named) <= 400 else f"{named[:400]}..."


def _check_single_stack(config: Any) -> None:
    """Raises `ValueError` for configs of several models, or of layers that cannot be resized."""
    kind = type(config).__name__
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if parts:
        raise ValueError(f"teacher_config: {kind} contains {', '.join(parts)}; give the config of its text model")
    if getattr(config, "is_heterogeneous", False):
        raise ValueError("teacher_config.per_layer_config: layers with individual settings cannot be resized")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        size = getattr(config, name, None)
        if not isinstance(size, int):
            found = "has no such attribute" if size is None else f"has {size!r}, expected an int"
            raise ValueError(f"{name}: {kind} {found}")


def _own_names(config: Any, sizes: dict[str, int], intermediate_given: bool) -> dict[str, Any]:
    """The sizes by their names in the config's type."""
    own: dict[str, Any] = dict(sizes)
    intermediate = own.pop("intermediate_size")
    names = [name for name in _INTERMEDIATE if hasattr(config, name)]
    for name in names if config.is_encoder_decoder else names[:1]:
        listed = isinstance(getattr(config, name), (list, tuple))
        own[name] = [intermediate] * sizes["num_hidden_layers"] if listed else intermediate
    if intermediate_given and not names:
        raise ValueError(f"intermediate_size: {type(config).__name__} has no such attribute")
    return {config.attribute_map.get(name, name): size for name, size in own.items()}


def _resized(teacher: Any, sizes: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """The teacher's config with other sizes, and with the settings that depend on them.

    Settings that the class derives from the sizes (types of layers, head width) must be derived again. To find them,
    settings of the teacher are left out one by one: a setting is derived if the class restores its value. Other
    settings are resized according to their value.
    """

    def made(settings: dict[str, Any]) -> Any:
        return type(teacher).from_dict(copy.deepcopy(settings), attn_implementation=teacher._attn_implementation)

    before = teacher.to_dict()
    own = {name: before[name] for name in sizes if name in before}
    kept = {name: value for name, value in before.items() if name not in sizes}
    if made(before).to_dict() == before:
        for name in [name for name, value in kept.items() if isinstance(value, (int, list, dict))]:
            fewer = {key: value for key, value in kept.items() if key != name}
            with contextlib.suppress(Exception):  # the class requires the setting
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
    """Resizes a setting of a teacher with (layers, hidden size, heads) `old` for a student with `new`."""
    (depth, width, heads), (new_depth, new_width, new_heads) = old, new
    if isinstance(value, int) and not isinstance(value, bool):
        if _HEAD_WIDTH.search(name) and value == width // heads:
            return new_width // new_heads
        if _HEADS.search(name) and value == heads:
            return new_heads
        if _KEY_HEADS.search(name) and value > 0 and new_heads % value and value * new_heads % heads == 0:
            return value * new_heads // heads  # as many query heads for each key head as in the teacher
        if _WIDTH.search(name) and value == width:
            return new_width
        if name.endswith("layers") and value == depth:
            return new_depth
    return _Pick(depth, lambda values: _per_layer(values, new_depth))(name, value)


@dataclass(frozen=True)
class _Pick:
    """Applies `choose` to settings that have an entry for each of `depth` layers, and returns others unchanged."""

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
                kinds = [
                    kind for pattern, times in value for kind in pattern * times
                ]  # such as [[["global", "local"], 12]]
                return [[self.choose(kinds), 1]] if len(kinds) == self.depth else value
            if "layer" in name and all(type(layer) is int and layer in layers for layer in value):
                chosen = self.choose([layer in value for layer in layers])
                return [layer for layer, is_chosen in enumerate(chosen) if is_chosen]
        return value


def _per_layer(values: Sequence[Any], count: int) -> list[Any]:
    """Entries for `count` layers: a repeating pattern is continued, other entries are selected evenly."""
    length = len(values)
    for period in range(1, length // 2 + 1):
        if all(values[i] == values[i % period] for i in range(length)):
            return [values[i % period] for i in range(count)]
    return _evenly(values, count)


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """Evenly spaced entries, with the first and the last; only the last if `count` is 1."""
    last = len(values) - 1
    return [values[round(i * last / (count - 1)) if count > 1 else last] for i in range(count)]


def _check_student(config: Any, teacher_config: Any) -> None:
    """Raises `ValueError` if a model with this config cannot be built, run or saved."""
    heads = config.num_attention_heads
    for name, value in config.to_dict().items():
        own = _KEY_HEADS.search(name) and name.startswith(("num_", "n_"))  # excludes settings of other types of layers
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
        if failure is not None:  # it may need values, which the meta device does not have
            failure = _failed_forward(random_student(config))
    except Exception as error:
        raise ValueError(f"{_described(config)} cannot be built: {one_line(error)}") from error
    if failure is None:
        return
    try:
        expected = _failed_forward(_without_memory(teacher_config))
    except Exception as error:
        expected = error
    if str(failure) != str(expected):  # models with other inputs than tokens fail with the teacher's sizes, too
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
    """The exception of a forward over a few tokens; None if it succeeds."""
    try:
        with torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))
    except Exception as error:
        return error
    return None


def random_student(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Creates a base model with random weights, in float32 on the CPU.

    The weights are initialized as the model's class defines. Equal seeds give equal weights. The global random state is
    not changed.

    Args:
        config: config of the model, for example from `student_config`.
        seed: seed of the weights.

    Returns:
        The model, without a task head.

    Raises:
        ValueError: transformers has no base model for the type of config.

    Example:
        >>> from transformers import BertConfig
        >>> from minilm_kernels import random_student, student_config
        >>> teacher_config = BertConfig(vocab_size=100)
        >>> student = random_student(student_config(teacher_config, num_hidden_layers=2, hidden_size=24))
        >>> type(student).__name__, student.num_parameters()
        ('BertModel', 29832)
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(seed)
        return AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)  # from_config modifies the config


def pca_student(teacher: PreTrainedModel, config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Creates a narrower student whose embeddings are the teacher's, reduced by PCA, in float32 on the CPU.

    The columns of W (teacher's hidden size, student's) are the principal directions of the teacher's word embeddings E:
    the eigenvectors of their covariance with the largest eigenvalues, computed in float64. E W, and the product of W
    with every other embedding of the same width (positions, token types), are the student's embeddings. W is
    orthonormal, so E W keeps as much of the variance of E as a projection to this width can. All other weights are
    random as in `random_student(config, seed=seed)`. If the width does not change, W is the identity.

    Args:
        teacher: a transformers model, with or without a task head.
        config: config of the student, from `student_config(teacher.config, ...)`.
        seed: seed of the other weights.

    Returns:
        The student, without a task head.

    Raises:
        TypeError: `teacher` is not a transformers model.
        ValueError: the student's word embeddings are wider than the teacher's, or have another vocabulary; or the
            teacher's are not finite.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from minilm_kernels import pca_student, student_config
        >>> teacher = BertModel(BertConfig(vocab_size=100, num_hidden_layers=2))
        >>> student = pca_student(teacher, student_config(teacher.config, num_hidden_layers=1, hidden_size=48))
        >>> student.embeddings.word_embeddings.weight.shape
        torch.Size([100, 48])
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: expected a transformers model, got {type(teacher).__name__}")
    base: Any = teacher.base_model
    words: torch.Tensor = base.get_input_embeddings().weight
    student: Any = random_student(config, seed=seed)
    rows, width = student.get_input_embeddings().weight.shape
    if rows != words.shape[0]:
        raise ValueError(
            f"config: its vocab_size is {rows}, but the teacher's word embeddings have {words.shape[0]} rows"
        )
    if width > words.shape[1]:
        raise ValueError(
            f"config: the student's word embeddings have {width} columns, more than the teacher's {words.shape[1]}; "
            "use random_student"
        )
    directions = principal_directions(words, width)
    sources = dict(base.named_modules())
    with torch.no_grad():
        for name, module in student.named_modules():
            source = sources.get(name)
            if isinstance(module, torch.nn.Embedding) and isinstance(source, torch.nn.Embedding):
                weight = source.weight.detach().to("cpu", torch.float64)
                if weight.shape[1] == words.shape[1] and module.weight.shape == (len(weight), width):
                    module.weight.copy_(weight @ directions)
    return student


def principal_directions(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` principal directions of the rows of a matrix, (columns, count) float64 with orthonormal columns.

    Eigenvectors have no sign: the largest component of each is made positive. If `count` is the number of columns, the
    directions are the unit vectors.
    """
    rows = embeddings.detach().to("cpu", torch.float64)
    if not rows.isfinite().all():
        raise ValueError("teacher: its word embeddings are not finite")
    if count == rows.shape[1]:
        return torch.eye(count, dtype=torch.float64)
    rows = rows - rows.mean(0)
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :count]  # eigenvalues ascend
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, count)
    return directions * largest.sign()


def copied_student(
    teacher: PreTrainedModel,
    layers: int | Sequence[int],
    *,
    projections: str | Sequence[str] | Mapping[str, str] | None = None,
) -> PreTrainedModel:
    """Creates a student from some layers of the teacher, in float32 on the CPU.

    Embeddings and pooler are copied, too; a task head is left out. If the teacher has no pooler, the student's pooler
    is initialized as in `random_student(config, seed=0)`. Training the student does not change the teacher.

    Args:
        teacher: a model of an architecture that `QKVExtractor` supports, or any other model with a single list of
            layers and `projections`.
        layers: the number of layers of the student, which are then evenly spaced layers of the teacher from its first
            to its last; or the teacher's layer for each layer of the student, counted from 1, or from -1 backwards.
        projections: for other models, the names of the teacher's projections or, for one of several stacks, its name;
            see `QKVExtractor`. Other stacks, such as a decoder, are copied as a whole.

    Returns:
        The student, without a task head.

    Raises:
        TypeError: `teacher` is not a transformers model, or a layer is not an integer.
        ValueError: the architecture is unknown and `projections` is not given; `layers` is empty or contains a layer
            that does not exist; or a layer cannot be used at its position in the student.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from minilm_kernels import copied_student
        >>> sizes = dict(hidden_size=24, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48)
        >>> teacher = BertModel(BertConfig(vocab_size=100, **sizes))
        >>> student = copied_student(teacher, layers=[2, 4, 6])
        >>> student.config.num_hidden_layers
        3
        >>> teacher_layer = teacher.encoder.layer[5].attention.self.query.weight
        >>> bool((student.encoder.layer[2].attention.self.query.weight == teacher_layer).all())
        True
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher: expected a transformers model, got {type(teacher).__name__}")
    base = teacher.base_model
    stack = find_stack(base, projections)
    path, count = stack.layers, stack.count
    if isinstance(layers, int):
        if not 0 < layers <= count:
            raise ValueError(f"layers={layers}: expected a number of layers from 1 to the teacher's {count}")
        layers = _evenly(range(1, count + 1), layers)
    sources = [resolve_layer(layer, count) - 1 for layer in layers]
    if not sources:
        raise ValueError(f"layers: expected at least one of the teacher's layers, 1 to {count}")

    student = random_student(_picked_config(base.config, sources, count))
    if stack.groups < count:  # one module runs in several layers
        if stack.groups > 1:
            raise ValueError(
                f"teacher: the layers of {type(base).__name__} share {stack.groups} modules; use random_student"
            )
        sources = [0]
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
            if _SHARED_BY_LAYERS.search(name):
                source_name = name
            if source_name in given:
                tensor.copy_(given[source_name])
            elif name.startswith(f"{path}."):
                raise ValueError(f"teacher: it has no {source_name}; merge adapters and revert other changes first")
    return student


def _picked_config(teacher_config: Any, sources: Sequence[int], count: int) -> Any:
    """The teacher's config with only the layers `sources`, counted from 0, of its `count` layers."""
    kind = type(teacher_config).__name__
    if getattr(teacher_config, "is_heterogeneous", False):
        raise ValueError(f"teacher: {kind} has a per_layer_config, whose layers cannot be selected")
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
    except Exception as error:  # config classes raise exceptions of their own
        raise ValueError(f"no {kind} has these layers: {one_line(error)}") from error
    config.name_or_path = ""
    return config


def _check_same_layer(student: Any, teacher: Any, at: str, source: str) -> None:
    """Raises `ValueError` if the student's layer `at` does not compute the same as the teacher's layer `source`."""
    mine, theirs = (
        {
            name: _plain_settings(module)
            for name, module in model.get_submodule(path).named_modules()
            if not _SHARED_BY_LAYERS.search(name)
        }
        for model, path in ((student, at), (teacher, source))
    )
    different = {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)}
    if different:
        raise ValueError(
            f"layers: the teacher's {source} cannot become the student's {at}: they differ in "
            f"{', '.join(name or 'their own settings' for name in sorted(different)[:3])}"
        )


def _plain_settings(module: torch.nn.Module) -> dict[str, Any]:
    """Class, shapes and settings of a module (window, type of attention, ...), without its position."""
    shapes = {name: x.shape for name, x in module.state_dict().items() if not _SHARED_BY_LAYERS.search(name)}
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (str, int, float)) and not name.startswith("_") and not _POSITION.search(name)
    }
    return {"class": type(module), **shapes, **settings}


# Settings of the published checkpoints. The positions of RoBERTa and XLM-R include the offset of the padding index.
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"vocab_size": 30522, "max_position_embeddings": 512},
    "roberta": {"vocab_size": 50265, **_ROBERTA},
    "xlm-roberta": {"vocab_size": 250002, **_ROBERTA},
}


def preset_config(name: str) -> PreTrainedConfig:
    """Creates the config of a published student, without any download.

    Args:
        name: a key of `PRESETS`.

    Returns:
        A config with 12 attention heads and an intermediate size of 4 * hidden size.

    Raises:
        ValueError: there is no such preset. The message lists the names.

    Example:
        >>> from minilm_kernels.students import preset_config
        >>> config = preset_config("minilmv2-l6-h384-roberta-large")
        >>> config.model_type, config.num_hidden_layers, config.hidden_size
        ('roberta', 6, 384)
    """
    if name not in PRESETS:
        raise ValueError(f"name={name!r}: no such preset; the presets are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    family = AutoConfig.for_model(preset.family, **_FAMILIES[preset.family])
    return student_config(family, preset.num_hidden_layers, preset.hidden_size)


def parameter_count(config: PreTrainedConfig) -> int:
    """Counts the parameters of the word embeddings and the Transformer layers, without allocating them.

    Other embeddings (positions, token types, their LayerNorm) and the pooler are not counted. Counted like this, every
    preset rounds to the number of millions that the papers give.

    Args:
        config: config of the model.

    Returns:
        The number of parameters.

    Example:
        >>> from minilm_kernels.students import parameter_count, preset_config
        >>> parameter_count(preset_config("minilmv2-l6-h384-roberta-large"))
        29948544
    """
    model = _without_memory(config)
    counted = [model.get_input_embeddings(), model.get_submodule(layer_path(model))]
    return sum(p.numel() for module in counted for p in module.parameters())
