"""`DistillConfig`: every setting of a distillation run. The command line is generated from its fields."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from minilm_kernels._choices import BACKENDS

from .config_checks import DEFAULT_RELATIONS, check_combinations, check_ranges
from .config_values import coerce, default_of, flag, show, shown
from .recipes import recipe_options

LARGEST_SEED = 2**63 - 1  # the largest int64, which both torch and numpy accept
# Larger than in any model, so that a typing error is reported at once instead of using up the memory.
_LARGEST_LAYERS, _LARGEST_WIDTH = 10_000, 2**20
# Options of a whole run, which a teacher assistant cannot have of its own.
_NOT_OF_ASSISTANTS = {
    *("recipe", "teacher", "teacher_layer", "teacher_projections", "teacher_assistant"),
    *("output_dir", "resume_from_checkpoint", "device", "tokens"),
}


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    neutral: bool = False,
    positive: bool = False,
    nargs: str = "",
    path: bool = False,
    largest: int = 2**31 - 1,
    absent: str = "none",
) -> Any:
    """A dataclass field that carries its help text and constraints as metadata.

    Args:
        default: `MISSING` for a required option.
        neutral: True if the option may change when a run is resumed, because the results do not depend on it.
        positive: True if the value must be above 0.
        nargs: `nargs` of the argument in argparse.
        path: True if the value may name a file or folder; `~` is then expanded.
        largest: the largest magnitude of an integer.
        absent: the word for an option that is not set.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "neutral": neutral,
        "positive": positive,
        "nargs": nargs,
        "path": path,
        "largest": largest,
        "absent": absent,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Settings of a distillation run, for `distill` and `minilm-distill`.

    The defaults are the published MiniLMv2 recipe. The field `max_steps` is the option `--max-steps` of the command
    line and the key `max_steps` of a settings file, and so on for each field; `minilm-distill --help` describes them. A
    value may have the declared type or be the text that the command line accepts (`"1,3,5"`, `"qq:1,kk:0.5"`). The
    field `recipe` only names the recipe that `from_mapping` has filled in.

    Raises:
        ValueError: a value is outside its range, or options exclude each other. The message names the option.

    Example:
        >>> from minilm_kernels.distill import DistillConfig
        >>> config = DistillConfig(
        ...     teacher="google-bert/bert-base-uncased",
        ...     copy_layers=(2, 4, 6, 8, 10, 12),
        ...     text=("corpus/",),
        ...     output_dir="run",
        ...     max_steps=100_000,
        ... )
        >>> config.warmup
        4000
        >>> print(config.command())
        minilm-distill --teacher=google-bert/bert-base-uncased --output-dir=run --copy-layers=2,4,6,8,10,12 --text corpus/ --max-steps=100000
    """  # noqa: E501

    recipe: str | None = _option(
        None,
        "settings of a published student, its teacher included; other options override them; list prints all recipes",
        neutral=True,
    )
    teacher: str = _option(MISSING, "teacher: hub name or local folder with safetensors weights", path=True)
    output_dir: str = _option(
        MISSING, "folder of the run: checkpoints/, metrics.jsonl, student/", neutral=True, path=True
    )

    teacher_assistant: tuple[dict[str, Any], ...] = _option(
        (),
        "distill the teacher into an assistant of this many layers and this hidden size first, and the assistant into "
        "the student, for example 12x384; several assistants, separated by commas, are distilled one after the other; "
        "in a settings file, each may be a mapping of options that differ from the student's",
    )

    student: str | None = _option(None, "existing model to train as the student: hub name or local folder", path=True)
    copy_layers: tuple[int, ...] | None = _option(
        None,
        "copy these layers of the teacher (counted from 1) into a new student, for example 1,3,5",
        largest=_LARGEST_LAYERS,
    )
    student_num_hidden_layers: int | None = _option(
        None,
        "create a new student with this many layers (requires --student-hidden-size)",
        positive=True,
        largest=_LARGEST_LAYERS,
    )
    student_hidden_size: int | None = _option(
        None,
        "hidden size of the new student; its intermediate size is 4 times as large",
        positive=True,
        largest=_LARGEST_WIDTH,
    )
    student_num_attention_heads: int = _option(
        12, "number of attention heads of the new student", positive=True, largest=_LARGEST_WIDTH
    )
    student_num_key_value_heads: int | None = _option(
        None,
        "number of key and value heads of the new student; by default, that of the teacher, or as many query heads for "
        "each key head as in the teacher",
        positive=True,
        largest=_LARGEST_WIDTH,
    )
    student_init: str = _option(
        "random",
        "weights of the new student; random: all are random; pca: its embeddings are the teacher's, reduced to its "
        "hidden size by PCA; copy: it consists of evenly spaced layers of the teacher (without --student-hidden-size)",
        choices=("random", "pca", "copy"),
    )
    trim_vocabulary: int | None = _option(
        None,
        "give the student a vocabulary of at most this many tokens, the teacher's most frequent ones in the training "
        "text",
        positive=True,
    )
    trim_vocabulary_documents: int = _option(
        100_000, "number of documents of the training text in which --trim-vocabulary counts tokens", positive=True
    )
    dropout: float | None = _option(None, "dropout of the student in training; by default, that of its config")

    method: str = _option("minilmv2", "distillation loss", choices=("minilm", "minilmv2"))
    relations: dict[str, float] = _option(  # noqa: RUF009
        DEFAULT_RELATIONS, "minilmv2: relations with optional weights, for example qq:1,kk:1,vv:0.5"
    )
    relation_heads: int | None = _option(
        None,
        "minilmv2: number of relation heads; the default is 48, or 64 if the teacher's hidden size is 1024 or more",
        positive=True,
        largest=_LARGEST_WIDTH,
    )
    teacher_layer: int = _option(
        -1,
        "layer of the teacher to distill, counted from 1; -1 is the last (the papers use 21 or 19 of 24 for large "
        "teachers)",
        largest=_LARGEST_LAYERS,
    )
    student_layer: int = _option(
        -1, "layer of the student to train, counted from 1; -1 is the last", largest=_LARGEST_LAYERS
    )
    teacher_projections: tuple[str, ...] | None = _option(
        None,
        "for teachers whose query, key and value modules have unusual names: these names, with {i} for the index of "
        "the layer from 0, for example layers.{i}.attention.to_q layers.{i}.attention.to_k layers.{i}.attention.to_v; "
        "or the one of a fused projection and the order of its output, as in layers.{i}.attention.to_qkv:blocks; or "
        "the name of one of several stacks of layers, which for encoder-decoders is encoder by default",
        nargs="+",
    )
    student_projections: tuple[str, ...] | None = _option(
        None, "the same names for the student; by default, the teacher's if the student is made from it", nargs="+"
    )
    mask: str = _option(
        "auto",
        "attention mask of both models and of the loss; auto: that of the models, which is causal for decoders",
        choices=("auto", "bidirectional", "causal", "prefix"),
    )
    prefix_range: tuple[float, float] = _option(
        (0.25, 0.75),
        "with --mask prefix: the share of a document's tokens that form its prefix, drawn at every step, uniformly "
        "between LOW and HIGH",
    )
    reduction: str = _option(
        "sequence",
        "sequence: mean over tokens, then over documents; token: mean over all tokens; sum: sum over all tokens",
        choices=("sequence", "token", "sum"),
    )
    backend: str = _option(
        "auto",
        "backend of the relation operator (see minilm_kernels.backend_status)",
        choices=("auto", *BACKENDS),
    )

    text: tuple[str, ...] = _option(
        (),
        "training text: UTF-8 files, or folders that are searched recursively, with .txt, .md, .jsonl, .json, .csv and "
        ".tsv files (optionally compressed as .gz, .bz2 or .xz) and .parquet files",
        nargs="+",
        path=True,
    )
    dataset_name: str | None = _option(
        None, "training text: data set of the Hugging Face hub, instead of --text", path=True
    )
    dataset_config_name: str | None = _option(None, "configuration name of the hub data set")
    dataset_split: str = _option("train", "split of the hub data set")
    tokens: str | None = _option(
        None,
        "training text: folder of minilm-distill prepare, instead of --text; without it, the text is tokenized before "
        "the first step, into the folder tokens in --output-dir",
        neutral=True,
        path=True,
    )
    max_train_documents: int | None = _option(
        None, "number of documents to use from the beginning of the training text", positive=True, absent="all"
    )
    preprocessing_num_workers: int | None = _option(
        None,
        "number of processes that tokenize the text; by default, one for each available processor",
        neutral=True,
        positive=True,
    )
    text_column: str = _option(
        "text", "name of the column with the text, in hub data sets, JSON objects, CSV and Parquet files"
    )
    documents: str = _option(
        "paragraph",
        "plain text files: blank lines separate documents (paragraph), or every line is a document (line)",
        choices=("paragraph", "line"),
    )
    bad_documents: str = _option(
        "skip",
        "handling of unreadable documents (broken JSON, missing text, invalid UTF-8, damage); skip: skip them, with a "
        "warning and a count in the metrics; error: stop with an error",
        choices=("skip", "error"),
        neutral=True,
    )
    eval_text: tuple[str, ...] = _option(
        (),
        "text for the evaluation loss; by default, a part of the training documents is used (see --eval-fraction)",
        nargs="+",
        path=True,
    )
    eval_fraction: float = _option(
        0.01,
        "share of the training documents that is used for evaluation instead of training (at least one document), "
        "selected by a hash of their content; 0 turns evaluation off",
    )
    eval_samples: int = _option(256, "number of evaluation samples of up to --max-seq-length tokens", positive=True)
    max_seq_length: int = _option(512, "number of tokens of a sample, including special tokens", largest=2**20)
    max_document_length: int | None = _option(
        None,
        "number of tokens of the longest document, including special tokens; longer ones are cut into pieces; auto: "
        "--max-seq-length, but at most the positions of the models",
        positive=True,
        largest=2**20,
        absent="auto",
    )
    packing: bool = _option(
        True,
        "pack several documents into each sample, without attention between them; --no-packing: one document per "
        "sample, with padding",
    )
    attention: str = _option(
        "auto",
        "attention of both models in packed samples; packed: all documents in one row, with their borders; mask: a "
        "mask of --max-seq-length x --max-seq-length; auto: packed for models that support it",
        choices=("auto", "packed", "mask"),
    )

    max_steps: int = _option(400_000, "number of optimizer steps", positive=True)
    total_batch_size: int = _option(
        256, "number of samples per optimizer step, over all processes and micro-batches together", positive=True
    )
    gradient_accumulation_steps: int = _option(
        1, "number of micro-batches into which each process splits its part of the batch", neutral=True, positive=True
    )
    micro_batch_size: int | None = _option(
        None,
        "number of samples that each process computes at once; auto: its part of the batch, divided by "
        "--gradient-accumulation-steps; if memory runs out, either is halved and the step is repeated",
        neutral=True,
        positive=True,
        absent="auto",
    )
    parallel: str = _option(
        "ddp",
        "several processes; ddp: each has the whole student; fsdp: parameters, gradients and the optimizer's state of "
        "the student are sharded (FSDP2), for large students",
        choices=("ddp", "fsdp"),
        neutral=True,
    )
    gradient_dtype: str = _option(
        "float32",
        "several processes: type in which gradients are exchanged; bfloat16 halves the bytes",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = _option(
        False,
        "compute the student's activations again in the backward instead of keeping them, which saves memory",
        neutral=True,
    )
    learning_rate: float = _option(6e-4, "peak learning rate", positive=True)
    warmup_steps: int | None = _option(
        None, "number of linear warmup steps; the default is 4000, but at most a tenth of --max-steps"
    )
    adam_betas: tuple[float, float] = _option((0.9, 0.999), "betas of AdamW")
    adam_epsilon: float = _option(1e-6, "epsilon of AdamW", positive=True)
    weight_decay: float = _option(0.01, "weight decay of AdamW (not applied to biases and LayerNorms)")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm; 0 turns clipping off")
    bf16: bool = _option(False, "run both models under bfloat16 autocast instead of in float32")
    teacher_dtype: str = _option(
        "float32",
        "type of the teacher's weights and computation; bfloat16 halves their memory",
        choices=("float32", "bfloat16"),
    )
    cache_teacher: str | None = _option(
        None,
        "folder in which the teacher's queries, keys and values of all training samples are stored, and from which "
        "later students of the same teacher, text, seed and lengths read them",
        path=True,
    )
    cache_teacher_dtype: str = _option(
        "bfloat16",
        "type of the values in --cache-teacher; bfloat16 rounds them to 8 bits, float32 keeps them",
        choices=("bfloat16", "float32"),
    )
    torch_compile: bool = _option(
        False,
        "compile both models with torch.compile, which takes minutes before the first step; evaluations run without it",
    )
    seed: int = _option(0, "random seed for initial weights, sample order, dropout and prefixes", largest=LARGEST_SEED)
    device: str = _option("auto", "auto: CUDA if available, otherwise CPU", choices=("auto", "cpu", "cuda"))

    logging_steps: int = _option(10, "number of steps between two lines of metrics", neutral=True, positive=True)
    eval_steps: int = _option(
        1000,
        "number of steps between two evaluations; the student is also evaluated before the first and after the last "
        "step",
        neutral=True,
        positive=True,
    )
    save_steps: int = _option(
        1000,
        "number of steps between two checkpoints; one is also written after a stop signal and after the last step",
        neutral=True,
        positive=True,
    )
    load_best_model_at_end: bool = _option(
        False,
        "the student gets the weights with the lowest evaluation loss instead of the last ones; a checkpoint is "
        "written after every evaluation that lowers it",
    )
    save_total_limit: int = _option(2, "number of checkpoints to keep", neutral=True, positive=True)
    report_to: tuple[str, ...] = _option(
        (),
        "also send the metrics to these: tensorboard (files in --output-dir), wandb (Weights & Biases)",
        choices=("tensorboard", "wandb"),
        neutral=True,
        nargs="+",
    )
    push_to_hub: bool = _option(
        False, "upload the finished student to the Hugging Face hub, with its model card and metrics", neutral=True
    )
    hub_model_id: str | None = _option(
        None, "name of the repository on the hub; by default, that of the folder --output-dir", neutral=True
    )
    hub_private_repo: bool = _option(False, "create the repository as a private one", neutral=True)
    resume_from_checkpoint: bool = _option(
        False,
        "continue from the newest complete checkpoint in --output-dir, or start from the beginning if there is none",
        neutral=True,
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(DistillConfig)
        for option in fields(self):
            value = getattr(self, option.name)
            object.__setattr__(self, option.name, coerce(option, value, hints[option.name]))
        object.__setattr__(self, "teacher_assistant", tuple(map(_assistant_options, self.teacher_assistant)))
        if self.recipe is not None:
            recipe_options(self.recipe)
        check_ranges(self)
        check_combinations(self)
        try:
            self.assistant()
        except ValueError as error:
            raise ValueError(f"--teacher-assistant: {error}") from error

    @property
    def warmup(self) -> int:
        """Steps of linear warmup."""
        return min(4000, self.max_steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def hub_name(self) -> str:
        """The repository of `--push-to-hub`."""
        return self.hub_model_id or Path(self.output_dir).resolve().name

    def published(self) -> DistillConfig:
        """The settings without folders of this machine: existing files and folders are named without their path."""
        short: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.metadata["path"] and value is not None:
                short[option.name] = tuple(map(_name, value)) if isinstance(value, tuple) else _name(value)
        return replace(self, **{**short, "output_dir": Path(self.output_dir).name or "run"})

    def micro_batch(self, processes: int) -> int:
        """Number of samples that each process computes at once, as long as memory is enough."""
        share = self.total_batch_size // processes
        return min(self.micro_batch_size or share // self.gradient_accumulation_steps, share)

    def assistant(self) -> DistillConfig | None:
        """The settings with which the last teacher assistant is distilled; `None` without an assistant.

        They are those of the student, except for its sizes, weights and vocabulary.
        """
        if not self.teacher_assistant:
            return None
        *earlier, last = self.teacher_assistant
        own = {
            "student": None,
            "copy_layers": None,
            "trim_vocabulary": None,
            "student_num_hidden_layers": None,
            "student_hidden_size": None,
            "student_init": "random" if self.student_init == "copy" else self.student_init,
        }
        # An earlier assistant differs from the student, not from the assistant after it.
        restored = {name: own.get(name, getattr(self, name)) for name in last}
        others = tuple({**restored, **assistant} for assistant in earlier)
        return replace(self, recipe=None, teacher_assistant=others, **{**own, **last})

    def as_dict(self) -> dict[str, Any]:
        """The settings with JSON types only."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Differences that prevent a run with the settings `other` (an `as_dict`) from being resumed with these.

        Returns:
            One line for each option that differs and on which the results depend.
        """
        mine = self.as_dict()
        return [
            f"{flag(option.name)}: {show(other.get(option.name))[:100]} before, {show(mine[option.name])} now"
            for option in fields(self)
            if not option.metadata["neutral"] and mine[option.name] != other.get(option.name)
        ]

    def command(self, processes: int = 1) -> str:
        """The command line of these settings: `minilm-distill`, or torchrun if there are several processes."""
        words = ["minilm-distill"]
        if processes > 1:
            words = ["torchrun", "--nproc-per-node", str(processes), "-m", "minilm_kernels.distill"]
        recipe = {} if self.recipe is None else recipe_options(self.recipe)
        given = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if value != recipe.get(option.name, default_of(option)) and option.name != "resume_from_checkpoint":
                given[option.name] = value
        if self.recipe is not None:
            implied = recipe_options(self.recipe, given).get("teacher_assistant", ())
            if self.teacher_assistant == tuple(map(_assistant_options, implied)):
                given.pop("teacher_assistant", None)
        for name, value in given.items():
            option = self.__dataclass_fields__[name]
            if isinstance(value, bool):
                words.append(flag(name) if value else flag(name).replace("--", "--no-"))
            elif option.metadata["nargs"]:
                words += [flag(name), *value]
            else:  # joined by "=", so that a value may begin with a dash
                words.append(f"{flag(name)}={option.metadata['absent'] if value in (None, ()) else show(value)}")
        return shlex.join(words)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "settings") -> DistillConfig:
        """Creates the settings from option names (`max_steps` or `max-steps`) and values.

        Only this method fills in the options of a recipe.

        Args:
            values: names and values; options that keep the value of the recipe or their default may be left out.
            origin: where the values come from, for error messages.

        Raises:
            ValueError: a name is unknown or given in both spellings, a required option is missing, or the class
                refuses a value.
        """
        legal = [option.name for option in fields(cls)]
        chosen = options_by_name(values, origin)
        for name in chosen:
            if name not in legal:
                raise ValueError(f"{origin}: unknown option {shown(name)}; {advice(name)}")
        if chosen.get("recipe") is not None:
            chosen = {**recipe_options(chosen["recipe"], chosen), **chosen}
        for option in fields(cls):
            if default_of(option) is MISSING and option.name not in chosen:
                raise ValueError(f"{flag(option.name)} is required: {option.metadata['help']}")
        return cls(**chosen)


def _name(path: str) -> str:
    """The last part of an existing path; other values, such as names on the hub, are returned as they are."""
    return Path(path).resolve().name if Path(path).exists() else path


def _assistant_options(values: Mapping[Any, Any]) -> dict[str, Any]:
    """The options of a teacher assistant, of the declared types."""
    hints = get_type_hints(DistillConfig)
    legal = {option.name: option for option in fields(DistillConfig) if option.name not in _NOT_OF_ASSISTANTS}
    chosen = options_by_name(values, "--teacher-assistant")
    for name in chosen:
        if name not in legal:
            problem = "is an option of the whole run" if name in _NOT_OF_ASSISTANTS else "is unknown"
            raise ValueError(f"--teacher-assistant: option {shown(name)} {problem}; {advice(name)}")
    return {name: coerce(legal[name], value, hints[name]) for name, value in chosen.items()}


def options_by_name(values: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """`values` with field names as keys. Unknown names are kept.

    Raises `ValueError` if an option is given in both spellings.
    """
    keys: dict[str, Any] = {}
    for key in values:
        name = (key if isinstance(key, str) else shown(key)).replace("-", "_")
        if name in keys:
            raise ValueError(f"{origin}: {shown(keys[name])} and {shown(key)} are the same option; give it once")
        keys[name] = key
    return {name: values[key] for name, key in keys.items()}


def advice(name: str, spelling: Callable[[str], str] = str) -> str:
    """Suggests options that resemble an unknown name.

    Args:
        spelling: converts an option's name to the form that the user has written.
    """
    legal = [option.name for option in fields(DistillConfig)]
    close = difflib.get_close_matches(name[:80].strip("-").replace("-", "_"), legal, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(spelling, close))}?" if close else "minilm-distill --help lists the options"
