"""The settings of a distillation run: one validated dataclass, from which the command line is generated."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from minilm_kernels._choices import BACKENDS

PAIRS = tuple(a + b for a in "qkv" for b in "qkv")
_RELATIONS = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
LARGEST_SEED = 2**63 - 1  # the largest int64, which torch and numpy both take
LARGEST_FILE = 2**18  # bytes of a settings file
# Models and optimizer compute in float32: beyond the first a number is infinite there, below the second it loses bits.
_LARGEST_FLOAT32, _SMALLEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127, 2.0**-126
_LAYERS, _WIDTH = 10_000, 2**20  # more than any model has: an error of typing, not of memory after minutes


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    neutral: bool = False,
    positive: bool = False,
    nargs: str = "",
    path: bool = False,
    most: int = 2**31 - 1,
) -> Any:
    """A field with its help.

    `neutral`: may change between the parts of a resumed run without changing its numbers. `path`: may name a file or
    folder, in which `~` is expanded. `most`: the largest magnitude of an integer.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "neutral": neutral,
        "positive": positive,
        "nargs": nargs,
        "path": path,
        "most": most,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Every option of `distill` and `minilm-distill`; the defaults are the published MiniLMv2 recipe.

    Values are accepted as the declared type or as the text that the command line takes (`"1,3,5"`, `"qq:1,kk:0.5"`).
    Raises `ValueError` that names the option for a value outside its range and for options that exclude each other.
    """

    teacher: str = _option(MISSING, "teacher: hub name or local folder (safetensors weights)", path=True)
    output: str = _option(MISSING, "folder of the run: checkpoints, metrics.jsonl, student/", neutral=True, path=True)

    student: str | None = _option(None, "student to start from: hub name or local folder", path=True)
    copy_layers: tuple[int, ...] | None = _option(
        None, "make the student of these teacher layers (1-based), for example 1,3,5", most=_LAYERS
    )
    student_layers: int | None = _option(
        None, "make a random student with so many layers (with --student-hidden)", positive=True, most=_LAYERS
    )
    student_hidden: int | None = _option(
        None, "hidden size of the random student; its intermediate size is 4 times that", positive=True, most=_WIDTH
    )
    student_heads: int = _option(12, "attention heads of the random student", positive=True, most=_WIDTH)
    dropout: float | None = _option(None, "dropout of the student in training; default: what its configuration says")

    method: str = _option("minilmv2", "the loss", choices=("minilm", "minilmv2"))
    relations: dict[str, float] = _option(  # noqa: RUF009
        _RELATIONS, "minilmv2: relations with optional weights, for example qq:1,kk:1,vv:0.5"
    )
    relation_heads: int | None = _option(
        None,
        "minilmv2: relation heads; default: 48, or 64 for teachers of hidden size 1024 and more",
        positive=True,
        most=_WIDTH,
    )
    teacher_layer: int = _option(
        -1, "teacher layer, 1-based, -1 is the last (published: 21 of 24 or 19 of 24 if large)", most=_LAYERS
    )
    student_layer: int = _option(-1, "student layer, 1-based, -1 is the last", most=_LAYERS)
    teacher_projections: tuple[str, ...] | None = _option(
        None,
        "teachers of other architectures: the three projections, {i} for the layer's index from 0, for example "
        "layers.{i}.self_attn.q_proj layers.{i}.self_attn.k_proj layers.{i}.self_attn.v_proj",
        nargs="+",
    )
    student_projections: tuple[str, ...] | None = _option(None, "the same for the student", nargs="+")
    mask: str = _option(
        "bidirectional",
        "which tokens see which, in both models and the loss",
        choices=("bidirectional", "causal", "prefix"),
    )
    prefix_range: tuple[float, float] = _option(
        (0.25, 0.75),
        "--mask prefix: each document's prefix is a share of its tokens, drawn uniformly from LOW,HIGH at every step",
    )
    reduction: str = _option(
        "sequence",
        "mean over documents of their token means, mean over all tokens, or sum",
        choices=("sequence", "token", "sum"),
    )
    backend: str = _option(
        "auto",
        "backend of the relation operator (see minilm_kernels.backend_status)",
        choices=("auto", *BACKENDS),
    )

    text: tuple[str, ...] = _option(
        (),
        "training text: files or folders, searched recursively: .txt, .md, .jsonl, .json, .csv, .tsv (also as .gz, "
        ".bz2 or .xz) and .parquet, in UTF-8",
        nargs="+",
        path=True,
    )
    dataset: str | None = _option(None, "training text: hub data set (streamed), instead of --text", path=True)
    dataset_config: str | None = _option(None, "configuration name of the hub data set")
    dataset_split: str = _option("train", "split of the hub data set")
    text_field: str = _option(
        "text", "field of JSON objects, column of CSV and Parquet files and hub data sets that holds the text"
    )
    documents: str = _option(
        "paragraph",
        "plain text: documents are separated by blank lines (paragraph), or each line is one (line)",
        choices=("paragraph", "line"),
    )
    bad_documents: str = _option(
        "skip",
        "a document that cannot be read (broken JSON, no text, no UTF-8, damaged): skip it, with a warning and a count "
        "in the metrics, or end the run (error)",
        choices=("skip", "error"),
        neutral=True,
    )
    heldout_text: tuple[str, ...] = _option(
        (), "text for the held-out loss; default: --heldout-fraction of the training documents", nargs="+", path=True
    )
    heldout_fraction: float = _option(
        0.01,
        "share of the training documents, chosen by a hash of their content, that is held out, but at least one; "
        "0: no held-out loss",
    )
    heldout_rows: int = _option(
        256, "rows of at most --seq-len tokens that the held-out loss is measured on", positive=True
    )
    seq_len: int = _option(512, "tokens of a row, special tokens included", most=2**20)
    packing: bool = _option(True, "fill each row with several documents that do not see each other; else one, padded")
    shuffle_rows: int = _option(2048, "rows in the shuffle buffer; 1 keeps the order of the text", positive=True)

    steps: int = _option(400_000, "optimizer steps", positive=True)
    batch_size: int = _option(256, "rows of one optimizer step, over all processes and micro-batches", positive=True)
    accumulation: int = _option(1, "micro-batches that a process splits its share of the batch into", positive=True)
    lr: float = _option(6e-4, "peak learning rate", positive=True)
    warmup_steps: int | None = _option(None, "steps of linear warm-up; default: 4000, at most a tenth of --steps")
    betas: tuple[float, float] = _option((0.9, 0.999), "AdamW's betas")
    eps: float = _option(1e-6, "AdamW's epsilon", positive=True)
    weight_decay: float = _option(0.01, "AdamW's weight decay (not on biases and LayerNorms)")
    clip: float = _option(1.0, "largest norm of the gradient; 0: no clipping")
    precision: str = _option("float32", "bfloat16: autocast of both models", choices=("float32", "bfloat16"))
    seed: int = _option(0, "seed of initial weights, order of the text, dropout and prefixes", most=LARGEST_SEED)
    device: str = _option("auto", "auto: a CUDA device where there is one", choices=("auto", "cpu", "cuda"))

    log_every: int = _option(10, "steps between two lines of metrics", neutral=True, positive=True)
    eval_every: int = _option(
        1000,
        "steps between two held-out losses (also before the first and after the last step)",
        neutral=True,
        positive=True,
    )
    checkpoint_every: int = _option(
        1000, "steps between two checkpoints (also at a signal and at the end)", neutral=True, positive=True
    )
    keep_checkpoints: int = _option(2, "checkpoints to keep", neutral=True, positive=True)
    resume: bool = _option(
        False, "continue from the newest whole checkpoint in --output, or begin if there is none", neutral=True
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(DistillConfig)
        for option in fields(self):
            value = getattr(self, option.name)
            object.__setattr__(self, option.name, _coerce(option, value, hints[option.name]))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for option in fields(self):
            value, most = getattr(self, option.name), option.metadata["most"]
            if option.metadata["positive"] and value is not None and not value > 0:
                raise ValueError(f"{flag(option.name)} must be positive, got {value}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int) and abs(number) > most:
                    raise ValueError(f"{flag(option.name)} must be at most {most}, got {shown(number)}")
        for name in ("warmup_steps", "weight_decay", "clip", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{flag(name)} must not be negative, got {value}")
        if self.seq_len < 8:
            raise ValueError(f"--seq-len must be at least 8, got {self.seq_len}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"--heldout-fraction must be in [0, 1), got {self.heldout_fraction}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"--betas must be in [0, 1), got {self.betas}")
        low, high = self.prefix_range
        if not 0 <= low <= high <= 1:
            raise ValueError(f"--prefix-range must be LOW,HIGH with 0 <= LOW <= HIGH <= 1, got {low},{high}")
        for name in ("teacher_layer", "student_layer", "copy_layers"):
            value = getattr(self, name)
            if value == 0 or (isinstance(value, tuple) and 0 in value):
                raise ValueError(f"{flag(name)} counts from 1 (or from -1 backwards), got {show(value)}")
        if self.copy_layers == ():
            raise ValueError("--copy-layers: expected at least one of the teacher's layers, got none")
        for name in ("teacher_projections", "student_projections"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise ValueError(f"{flag(name)}: expected three names, of query, key and value, got {len(value)}")

    def _check_combinations(self) -> None:
        if self.method == "minilm" and self.relation_heads is not None:
            raise ValueError("--relation-heads belongs to --method minilmv2; minilm uses the attention heads")
        if self.method == "minilm" and self.relations != _RELATIONS:
            raise ValueError("--relations belongs to --method minilmv2; minilm has the relations qk and vv")
        if (self.student_layers is None) != (self.student_hidden is None):
            raise ValueError("--student-layers and --student-hidden make a random student together: give both")
        sources = {
            "--student": self.student,
            "--copy-layers": self.copy_layers,
            "--student-layers": self.student_layers,
        }
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)}, got {' and '.join(given) or 'none of them'}")
        if bool(self.text) == bool(self.dataset):
            raise ValueError("give the training text as either --text or --dataset")
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"--warmup-steps ({self.warmup_steps}) must not exceed --steps ({self.steps})")
        if self.batch_size % self.accumulation:
            raise ValueError(f"--accumulation ({self.accumulation}) must divide --batch-size ({self.batch_size})")

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return min(4000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps

    def learning_rate(self, step: int) -> float:
        """Learning rate of 0-based `step`: linear warm-up to `lr`, then linear decay that reaches 0 after the last."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (self.steps - step) / (self.steps - self.warmup)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What keeps a run with the settings `other` (of `as_dict`) from continuing with these, one line an option."""
        mine = self.as_dict()
        return [
            f"{flag(option.name)}: {show(other.get(option.name))[:100]} before, {show(mine[option.name])} now"
            for option in fields(self)
            if not option.metadata["neutral"] and mine[option.name] != other.get(option.name)
        ]

    def command(self, processes: int = 1) -> str:
        """The command that runs these settings: `minilm-distill`, or torchrun for several processes."""
        words = ["minilm-distill"]
        if processes > 1:
            words = ["torchrun", "--nproc-per-node", str(processes), "-m", "minilm_kernels.distill"]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "resume" or value == default_of(option):
                continue
            if isinstance(value, bool):
                words.append(flag(option.name) if value else flag(option.name).replace("--", "--no-"))
            elif option.metadata["nargs"]:
                words += [flag(option.name), *value]
            else:  # the joined form also carries values that begin with a dash
                words.append(f"{flag(option.name)}={show(value)}")
        return shlex.join(words)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "settings") -> DistillConfig:
        """Settings from option names (`seq_len` or `seq-len`) to values.

        Raises `ValueError` for a name that is unknown or given in both spellings, for a required option that is missing
        and for all that the class refuses.
        """
        legal = [option.name for option in fields(cls)]
        chosen = _by_name(values, origin)
        for name in chosen:
            if name not in legal:
                raise ValueError(f"{origin}: unknown option {shown(name)}; {advice(name)}")
        for option in fields(cls):
            if default_of(option) is MISSING and option.name not in chosen:
                raise ValueError(f"{flag(option.name)} is required: {option.metadata['help']}")
        return cls(**chosen)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Options from a YAML or JSON file (JSON is YAML), by the names of `DistillConfig`'s fields.

    Raises `FileNotFoundError`, or `ValueError` that names the file: it cannot be read, is neither YAML nor JSON, or
    gives a key twice.
    """
    try:
        file = Path(_text(fspath(path), path=True))
    except ValueError as error:
        raise ValueError(f"--config: {error}") from None
    try:
        if not file.exists():
            raise FileNotFoundError(f"--config: there is no file {file}")
        if not file.is_file():
            raise FileNotFoundError(f"--config: there is no file {file}: that is a folder or a device")
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {shown(str(file))}: cannot be read: {error}") from error
    if len(content) > LARGEST_FILE:
        raise ValueError(f"--config {file}: expected at most {LARGEST_FILE} bytes of options, the file is larger")
    try:
        text = content.decode("utf-8-sig")
        is_json = file.suffix == ".json"
        values = json.loads(text, object_pairs_hook=_once) if is_json else yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"--config {file}: neither YAML nor JSON of options: nested too deeply") from None
    except Exception as error:  # for tags with values that do not fit, PyYAML's errors share no base class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--config {file}: neither YAML nor JSON: {reason[:400]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {file}: expected option names with values, got {type(values).__name__}")
    return _by_name(values, f"--config {file}")


class _Loader(yaml.SafeLoader):
    """YAML in which a mapping has each key once, and no merge keys: aliases below these multiply without bound."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        found = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if key.value in found:
                    problem = f"{shown(key.value)} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                found.add(key.value)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shown(name)} is given twice")
        values[name] = value
    return values


def _by_name(values: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """`values` under the names of fields; unknown names stay."""
    keys: dict[str, Any] = {}
    for key in values:
        name = (key if isinstance(key, str) else shown(key)).replace("-", "_")
        if name in keys:
            raise ValueError(f"{origin}: {shown(keys[name])} and {shown(key)} are the same option; give it once")
        keys[name] = key
    return {name: values[key] for name, key in keys.items()}


def advice(name: str, spelling: Callable[[str], str] = str) -> str:
    """What to do about a name that is no option; `spelling`: how an option's name is written where it was given."""
    legal = [option.name for option in fields(DistillConfig)]
    close = difflib.get_close_matches(name[:80].strip("-").replace("-", "_"), legal, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(spelling, close))}?" if close else "minilm-distill --help lists the options"


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def default_of(option: Field[Any]) -> Any:
    """The default of an option, `MISSING` for one that is required."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def show(value: Any) -> str:
    """A value as the command line takes it; one that is no option's value, as `shown` has it."""
    if isinstance(value, dict) and all(isinstance(weight, (int, float)) for weight in value.values()):
        return ",".join(f"{name}:{_number(weight)}" for name, weight in value.items())
    if isinstance(value, (tuple, list)) and all(isinstance(item, (str, int, float)) for item in value):
        return ",".join(map(str, value))
    return shown(value) if isinstance(value, (dict, tuple, list)) else str(value)


def _number(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


class _Short(reprlib.Repr):
    """Values from outside may be nested, aliased and large."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """`repr(value)` for a message: at most about 80 characters, whatever the value."""
    text = _Short().repr(value)
    return text if len(text) <= 90 else f"{text[:80]}…"


def _coerce(option: Field[Any], value: Any, hint: Any) -> Any:
    """`value` as the declared type; text is parsed, since YAML 1.1 reads `6e-4` as text too."""
    if NoneType in get_args(hint):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    choices = option.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{flag(option.name)} must be one of {', '.join(choices)}, got {shown(value)}")
    try:
        if get_origin(hint) is dict:
            return _relations(value)
        if get_origin(hint) is tuple:
            return _sequence(value, get_args(hint), option.metadata["path"])
        return _scalar(value, hint, option.metadata["path"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{flag(option.name)}: {error}") from error


_EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_READ: dict[type, tuple[type, ...]] = {float: (int, str), int: (str,)}  # from other types


def _scalar(value: Any, kind: type, path: bool = False) -> Any:
    if isinstance(value, PathLike):
        value = fspath(value)
    refused = ValueError(f"expected {_EXPECTED[kind]}, got {shown(value)}")
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right and (isinstance(value, bool) or not isinstance(value, _READ.get(kind, ()))):
        raise refused
    try:
        value = kind(value)
    except (ValueError, OverflowError):
        raise refused from None
    if kind is float:
        return _finite(value)
    return _text(value, path) if kind is str else value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    if abs(value) > _LARGEST_FLOAT32 or 0 < abs(value) < _SMALLEST_FLOAT32:
        raise ValueError(f"expected a number in the range of float32, got {value}")
    return value


def _text(value: str, path: bool) -> str:
    if not value.strip():
        raise ValueError(f"expected a name, got {shown(value)}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"expected text that UTF-8 can hold, without NUL, got {shown(value)}")
    if not path or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        advice = f"for a folder of that name write ./{value[:80]}"
        raise ValueError(f"there is no home folder for {shown(value)}; {advice}") from None


def _sequence(value: Any, kinds: tuple[Any, ...], path: bool) -> tuple[Any, ...]:
    kind, open_ended = kinds[0], kinds[-1] is Ellipsis
    if isinstance(value, str):
        value = [value] if kind is str else value.split(",")
    if not isinstance(value, (list, tuple)):
        value = [value]
    if not open_ended and len(value) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values, got {shown(value)}")
    return tuple(_scalar(item, kind, path) for item in value)


def _relations(value: Any) -> dict[str, float]:
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        pairs = [item.strip().partition(":") for item in value]
        value = {name: weight if colon else 1.0 for name, colon, weight in pairs}
        if len(value) < len(pairs):
            raise ValueError("a relation is named twice")
    if not isinstance(value, Mapping):
        raise ValueError(f"expected relations such as qq:1,kk:1,vv:0.5, got {shown(value)}")
    relations = {}
    for name, weight in value.items():
        if name not in PAIRS:
            raise ValueError(f"expected pairs of q, k and v ({', '.join(PAIRS)}), got {shown(name)}")
        relations[name] = _scalar(weight, float)
        if relations[name] < 0:
            raise ValueError(f"expected a weight of 0 or more for {name}, got {relations[name]}")
    if not any(relations.values()):
        raise ValueError(
            f"expected at least one relation with a weight above 0, got {shown(value) if value else 'none'}"
        )
    return relations
