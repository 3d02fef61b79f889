"""Loads models and tokenizers from folders and the hub. Nothing that comes from outside is executed or unpickled."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from torch import nn
from torch.nn.modules import module as hooks
from transformers import AutoModel, AutoTokenizer

from minilm_kernels.students import one_line

# A config may ask for any number of layers. What is built is bounded by what the weights' files hold.
_MOST_LAYERS = 10_000
_MOST_MODULES = 200_000  # of a model whose files are not known before it is loaded
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.spm", "tekken*")
_POINTER = b"version https://git-lfs"


def source_of(name: str, option: str) -> str:
    """The folder or hub name that a model or tokenizer is loaded from, for the value of --teacher or --student.

    The folder of a finished run stands for its student. What is not there at once is said on standard error, because
    the hub may take a minute to answer.

    Raises:
        FileNotFoundError: neither a folder nor a name that the hub could know.
        ValueError: a file, or the folder of a run without a student.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").exists() or not (path / "settings.json").exists():
            return str(path)
        if not (path / "student" / "config.json").exists():
            raise ValueError(f"{option}: {name} is the folder of a run that has no finished student yet")
        _say(f"{option}: {name} is the folder of a run; its student is taken, {path / 'student'}")
        return str(path / "student")
    if path.exists():
        raise ValueError(f"{option}: {name} is a file; give the folder that holds the model and its tokenizer")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{option}: there is no folder {name}") from None
    _say(f"{option}: there is no folder {name} here; asking the Hugging Face hub for a model of this name")
    return name


def load_tokenizer(source: str, option: str) -> Any:
    """The tokenizer of a `source_of`. Raises `ValueError` that names the option."""
    with _door(source, option, "tokenizer"):
        if Path(source).is_dir():
            _check_files(Path(source), _TOKENIZER_FILES)
            if not has_tokenizer(source):
                raise ValueError("it holds no file of a tokenizer, such as tokenizer.json or vocab.txt")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer("a")  # some damage shows when it is first used
        return tokenizer


def has_tokenizer(source: str) -> bool:
    """Whether a tokenizer can be expected there; where there are no files of one, transformers makes one up."""
    folder = Path(source)
    return not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES)


def load_model(source: str, option: str) -> tuple[Any, dict[str, Any]]:
    """The base model of a `source_of`, float32 on the CPU, and transformers' loading info: `missing_keys` and others.

    Raises:
        ValueError: whatever is wrong with the files, named with the option and the folder.
    """
    with _door(source, option, "model as safetensors"):
        tensors, size = None, 0
        if Path(source).is_dir():
            _check_files(Path(source), ("*.safetensors*",))
            files = _weights(Path(source))
            tensors, size = sum(map(_tensors, files)), sum(file.stat().st_size for file in files)
        with _bounded(tensors, size):
            model, info = AutoModel.from_pretrained(
                source,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed, for a message of our own
            )
        if info["mismatched_keys"]:
            name, held, wanted = min(info["mismatched_keys"])
            raise ValueError(
                f"its weights have other shapes than its config.json says, for example {name} {list(held)} where "
                f"{list(wanted)} is expected"
            )
        return model, info


@contextmanager
def _door(source: str, option: str, what: str) -> Iterator[None]:
    """Every exception of the libraries that read foreign files becomes one sentence."""
    try:
        yield
    except BaseException as error:  # a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        where = "folder" if Path(source).is_dir() else "hub name (there is no such folder here)"
        raise ValueError(f"{option}: no {what} could be loaded from the {where} {source}: {one_line(error)}") from error


def _check_files(folder: Path, patterns: Sequence[str]) -> None:
    """Refuses files that were never fetched, settings that no machine can build, and those that name code."""
    for file in (file for pattern in ("config.json", *patterns) for file in folder.glob(pattern)):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
            raise ValueError(f"{file.name} is a Git LFS pointer, not the file itself; fetch it with git lfs pull")
    if (folder / "config.json").exists():
        for name, value in _entries(_json(folder / "config.json")):
            if isinstance(value, int) and "layer" in name and value > _MOST_LAYERS:
                raise ValueError(f"config.json says {name} = {value}")
            if isinstance(value, str) and name.endswith("_implementation") and "/" in value:
                raise ValueError(f"config.json says {name} = {value}, which is code of the hub; take the line out")


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects, each with its key."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _entries(entry, str(key))
    else:
        yield name, value


def _weights(folder: Path) -> list[Path]:
    """The files that transformers will read; a `ValueError` if one of them is not a safetensors file of the folder."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            "it holds an adapter, not a whole model; merge it (peft's merge_and_unload) and save the result"
        )
    config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = config.get("transformers_weights") or next(
        (name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).exists()), None
    )
    if named is None:
        others = [file.name for pattern in ("*.bin", "*.pt", "*.h5", "*.msgpack") for file in folder.glob(pattern)]
        found = f"only {', '.join(others)}; convert it with save_pretrained" if others else "no weights"
        raise ValueError(f"it holds {found}")
    names = [str(named)]
    if names[0].endswith(".index.json"):
        names = sorted({str(name) for name in _json(_inside(folder, names[0]))["weight_map"].values()})
    wrong = [name for name in names if not name.endswith(".safetensors")]
    if wrong:
        raise ValueError(f"{wrong[0]} is named as a file of its weights and is no .safetensors file")
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} is named as a file of its weights and lies outside the folder")
    return folder / name


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds {type(content).__name__}, expected an object")
    return content


def _tensors(file: Path) -> int:
    with safe_open(file, "pt") as content:
        return len(content.keys())


@contextmanager
def _bounded(tensors: int | None, size: int) -> Iterator[None]:
    """Ends the building of a model that is far larger than its weights: `tensors` in files of `size` bytes."""
    most_modules = _MOST_MODULES if tensors is None else 1_000 + 10 * tensors
    most_elements = None if tensors is None else 1_000_000 + 8 * size  # weights of 4 bits have 2 elements a byte
    modules, elements = 0, 0
    counted: set[tuple[int, str]] = set()

    def count_module(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > most_modules:
            raise ValueError(f"its config.json describes a model of more than {most_modules} modules")

    def count_parameter(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal elements
        if parameter is None or most_elements is None or (id(parent), name) in counted:
            return
        counted.add((id(parent), name))
        elements += parameter.numel()
        if elements > most_elements:
            raise ValueError(
                f"its config.json describes a model of more than {most_elements} elements, its weights have {size} "
                "bytes"
            )

    handles = [
        hooks.register_module_module_registration_hook(count_module),
        hooks.register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"minilm-distill: {message}", file=sys.stderr)
