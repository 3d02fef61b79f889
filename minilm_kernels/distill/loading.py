"""Loads models and tokenizers from folders and the hub, without running code or unpickling data from them."""

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

# A config can ask for any number of layers. These limits and the size of the weight files bound the size of a model.
_MOST_LAYERS = 10_000
_MOST_MODULES = 200_000  # limit for models of the hub, because their files are not known before they are loaded
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.spm", "tekken*")
_POINTER = b"version https://git-lfs"


def resolve_source(name: str, option: str) -> str:
    """Returns the folder or hub name to load a model or tokenizer from.

    For the folder of a finished run, this is the folder of its student. A message on standard error is printed
    before the hub is asked, because the hub may take a minute to answer.

    Args:
        name: the value of `--teacher` or `--student`.
        option: the option, for messages.

    Raises:
        FileNotFoundError: there is no such folder, and the name is not valid on the hub.
        ValueError: the name is a file, or the folder of a run without a student.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").exists() or not (path / "settings.json").exists():
            return str(path)
        if not (path / "student" / "config.json").exists():
            raise ValueError(f"{option}: {name} is the folder of a run that has not finished its student")
        _say(f"{option}: {name} is the folder of a run; using its student {path / 'student'}")
        return str(path / "student")
    if path.exists():
        raise ValueError(f"{option}: {name} is a file; give the folder that contains the model and its tokenizer")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(f"{option}: there is no folder {name}") from None
    _say(f"{option}: there is no folder {name}; looking for a model of this name on the Hugging Face hub")
    return name


def load_tokenizer(source: str, option: str) -> Any:
    """Loads the tokenizer of a resolved source. Raises a `ValueError` that names the option."""
    with _loading_errors(source, option, "tokenizer"):
        if Path(source).is_dir():
            _check_files(Path(source), _TOKENIZER_FILES)
            if not has_tokenizer(source):
                raise ValueError("it has no tokenizer file, such as tokenizer.json or vocab.txt")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer("a")  # some errors appear on first use
        return tokenizer


def has_tokenizer(source: str) -> bool:
    """True if the source has files of a tokenizer. transformers invents a tokenizer for a folder without them."""
    folder = Path(source)
    return not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES)


def load_model(source: str, option: str) -> tuple[Any, dict[str, Any]]:
    """Loads the base model of a resolved source in float32 on the CPU.

    Returns:
        The model, and the loading info of transformers (`missing_keys`, `unexpected_keys`, ...).

    Raises:
        ValueError: the files cannot be loaded. The message names the option, the folder and the problem.
    """
    with _loading_errors(source, option, "safetensors model"):
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
                ignore_mismatched_sizes=True,  # reported below instead
            )
        if info["mismatched_keys"]:
            name, held, wanted = min(info["mismatched_keys"])
            raise ValueError(
                f"the shapes of its weights contradict its config.json, for example {name} has {list(held)}, expected "
                f"{list(wanted)}"
            )
        return model, info


@contextmanager
def _loading_errors(source: str, option: str, what: str) -> Iterator[None]:
    """Converts every exception of the loading libraries to a `ValueError` with a message of one sentence."""
    try:
        yield
    except BaseException as error:  # a panic in Rust code is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        where = "folder" if Path(source).is_dir() else "hub name (there is no such folder)"
        from minilm_kernels.students import one_line  # imports what only models need

        raise ValueError(f"{option}: no {what} could be loaded from the {where} {source}: {one_line(error)}") from error


def _check_files(folder: Path, patterns: Sequence[str]) -> None:
    """Raises `ValueError` for Git LFS pointers, absurd numbers of layers, and settings that refer to code."""
    for file in (file for pattern in ("config.json", *patterns) for file in folder.glob(pattern)):
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_POINTER):
            raise ValueError(f"{file.name} is a Git LFS pointer instead of the file; fetch the file with git lfs pull")
    if (folder / "config.json").exists():
        for name, value in _entries(_json(folder / "config.json")):
            if isinstance(value, int) and "layer" in name and value > _MOST_LAYERS:
                raise ValueError(f"config.json says {name} = {value}")
            if isinstance(value, str) and name.endswith("_implementation") and "/" in value:
                raise ValueError(
                    f"config.json says {name} = {value}, which refers to code on the hub; remove that line"
                )


def _entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of all members of nested objects."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _entries(entry, str(key))
    else:
        yield name, value


def _weights(folder: Path) -> list[Path]:
    """The weight files that transformers will read. Raises `ValueError` if they are not safetensors files."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            "it contains an adapter instead of a model; merge it (merge_and_unload in PEFT) and save the result"
        )
    config = _json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = config.get("transformers_weights") or next(
        (name for name in ("model.safetensors", "model.safetensors.index.json") if (folder / name).exists()), None
    )
    if named is None:
        suffixes = (".bin", ".pt", ".h5", ".msgpack")
        others = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
        found = f"only {', '.join(others)}; convert it with save_pretrained" if others else "no weights"
        raise ValueError(f"it contains {found}")
    names = [str(named)]
    if names[0].endswith(".index.json"):
        names = sorted({str(name) for name in _json(_inside(folder, names[0]))["weight_map"].values()})
    wrong = [name for name in names if not name.endswith(".safetensors")]
    if wrong:
        raise ValueError(f"{wrong[0]} is listed as one of its weight files, but is no .safetensors file")
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: str) -> Path:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} is listed as one of its weight files, but is outside of the folder")
    return folder / name


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} contains {type(content).__name__}, expected an object")
    return content


def _tensors(file: Path) -> int:
    with safe_open(file, "pt") as content:
        return len(content.keys())


@contextmanager
def _bounded(tensors: int | None, size: int) -> Iterator[None]:
    """Stops the creation of a model that is far larger than its weight files.

    Args:
        tensors: number of tensors in the files; `None` if unknown.
        size: bytes of the files.
    """
    most_modules = _MOST_MODULES if tensors is None else 1_000 + 10 * tensors
    most_elements = None if tensors is None else 1_000_000 + 8 * size  # 4-bit weights have 2 elements per byte
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
                f"its config.json describes a model of more than {most_elements} elements, but its weights have only "
                f"{size} bytes"
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
