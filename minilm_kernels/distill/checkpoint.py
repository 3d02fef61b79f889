"""Checkpoints and folders that are either whole or not there: written beside, synced, checked, renamed.

A folder becomes visible by one rename, after every byte of it is on disk. Its manifest holds size and SHA-256 of every
file, so a damaged one is told from a whole one and the previous is used. Tensors are safetensors, all else JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
TEMPORARY = ".unfinished-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run continues from.

    Attributes:
        step: optimizer steps done.
        numbers: JSON state (settings, data position, counters).
        tensors: file name without suffix to named tensors, on any device: model, optimizer, data, RNG.
    """

    step: int
    numbers: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder `target` of what `fill` writes into the empty folder it is given; replaces an older `target`.

    Raises:
        OSError: the disk is full or cannot be written; `target` is then as it was.
    """
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fill(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if target.exists():  # a damaged one: a folder cannot be renamed over another
            target.rename(temporary.with_name(temporary.name + ".old"))
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(temporary.with_name(temporary.name + ".old"), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise explained(error, target) from error


def write_file(target: Path, content: str) -> None:
    """Replaces a small file, whole or not at all. Raises `OSError` as `write_folder` does."""
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    try:
        temporary.write_text(content, encoding="utf-8")
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explained(error, target) from error


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what broken writes left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints `step-...` in one folder, of which the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def names(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def write(self, checkpoint: Checkpoint) -> None:
        """Writes one, then removes those beyond `keep`. Raises `OSError` if it cannot; the older ones stay whole."""

        def fill(folder: Path) -> None:
            for name, tensors in checkpoint.tensors.items():
                save_file(_plain(tensors), folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.numbers}))
            files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in folder.iterdir()}
            (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))

        write_folder(self.folder / f"step-{checkpoint.step:09d}", fill)
        for old in self.names()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, `None` if there never was one.

        A damaged one is reported and passed over. Raises `ValueError` if all of them are damaged.
        """
        damaged = []
        for folder in reversed(self.names()):
            try:
                return read_checkpoint(folder)
            except ValueError as error:
                print(f"minilm-distill: {error}; trying the checkpoint before it", file=sys.stderr)
                damaged.append(folder.name)
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} can be used: {', '.join(damaged)} are damaged; "
                "begin again in another --output"
            )
        return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads and checks one checkpoint. Raises `ValueError` that names what is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"written in format {manifest['format']}, this version reads {FORMAT}")
        for name, expected in manifest["files"].items():
            file = folder / name
            if file.stat().st_size != expected["bytes"]:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}")
            if _sha256(file) != expected["sha256"]:
                raise ValueError(f"{name} has a wrong checksum")
        numbers = json.loads((folder / "state.json").read_text())
        tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    return Checkpoint(numbers.pop("step"), numbers, tensors)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors wants them."""
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(storage.data_ptr())
        plain[name] = tensor
    return plain


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def explained(error: Exception, target: Path) -> OSError:
    """A failed write with what to do about it; safetensors gives the system's error only as text."""
    number = error.errno if isinstance(error, OSError) else None
    full = number in _FULL or any(f"os error {code}" in str(error) for code in _FULL)
    if full:
        return OSError(
            number or errno.ENOSPC,
            f"the disk is full: {target} could not be written. Nothing saved before is lost: make room, then continue "
            f"with --resume ({error})",
        )
    return OSError(number or errno.EIO, f"{target} could not be written: {error}")
