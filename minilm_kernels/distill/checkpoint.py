"""Checkpoints, and atomic writes of files and folders.

A folder is written under a temporary name, synced to disk and then renamed, so that it is either complete or does not
exist. The manifest of a checkpoint has the size and SHA-256 of every file. If the newest checkpoint is damaged, the
previous one is used. Tensors are stored as safetensors, everything else as JSON.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .console import say

FORMAT = 6
MANIFEST = "manifest.json"
STATE = "state.json"
TEMPORARY = ".unfinished-"
DAMAGED = "damaged-"
_STEP = re.compile(r"step-([0-9]+)")
_ASIDE = re.compile(rf"{DAMAGED}step-[0-9]+(\.[0-9]+)?")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of file systems that cannot sync folders (CIFS, FUSE), and of folders without read permission.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES}
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    SafetensorError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run.

    Attributes:
        step: number of finished optimizer steps.
        state: JSON state (settings, position in the text, counters).
        tensors: file name without suffix to named tensors on any device (model, optimizer, data, progress).
        folder: the folder from which it was read.
        digest: SHA-256 that identifies its content.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    folder: Path | None = None
    digest: str = ""


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Creates a folder atomically. An empty folder of the same name is replaced.

    Args:
        target: the folder.
        fill: writes the content into the empty folder that it is called with.

    Raises:
        OSError: the disk is full or cannot be written, or `fill` failed. Nothing is left behind.
    """
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    try:
        make_folder(target.parent)
        remove(temporary)
        temporary.mkdir()
        fill(temporary)
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file():
                _share(path, mode)
            sync(path)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    except BaseException as error:
        with suppress(OSError):
            remove(temporary)
        if isinstance(error, Exception):  # tokenizers raises plain exceptions
            raise write_error(error, target) from error
        raise


def write_file(target: Path, content: bytes) -> None:
    """Replaces a small file atomically. Raises `OSError` as `write_folder` does."""
    temporary = target.parent / f"{TEMPORARY}{target.name}"
    try:
        remove(temporary)
        _write(temporary, content)
        temporary.replace(target)
        sync(target.parent)
    except BaseException as error:
        with suppress(OSError):
            remove(temporary)
        if isinstance(error, OSError):
            raise write_error(error, target) from error
        raise


def _write(path: Path, content: bytes) -> None:
    """Writes a new file and syncs it, so that errors of the disk are raised here."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _share(path: Path, mode: int) -> None:
    """Sets the permissions of a file, because safetensors creates files that only their owner can read."""
    if stat.S_IMODE(path.stat().st_mode) & 0o666 != mode:
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(mode)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading. Raises `ValueError` for other files, because reading them might never end."""
    with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        yield file


def read_file(path: Path) -> bytes:
    """The content of a regular file."""
    with open_regular(path) as file:
        return file.read()


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, and syncs them to disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on disk. Skips folders that cannot be synced."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not folder or error.errno not in _NO_FOLDER_SYNC:
            raise


def remove(path: Path) -> None:
    """Removes a file, a link (but not its target) or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files of interrupted writes and removals from `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        try:
            remove(path)
        except OSError as error:
            say(f"{path} could not be removed: {error}")


class Checkpoints:
    """The checkpoints `step-NUMBER` of a run.

    Args:
        folder: contains the checkpoints.
        keep: number of complete checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def names(self) -> list[Path]:
        """The folders `step-NUMBER`, oldest first. Links, files and other names are ignored."""
        return self._folders(_STEP)

    def _folders(self, pattern: re.Pattern[str]) -> list[Path]:
        try:
            with os.scandir(self.folder) as entries:
                found = [e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []
        return [self.folder / name for name in sorted(found, key=lambda name: (_step_of(name), name))]

    def write(
        self, checkpoint: Checkpoint, extra: Callable[[Path], None] = lambda folder: None, best: int | None = None
    ) -> None:
        """Writes a checkpoint, then removes old ones.

        Args:
            extra: writes further files into the folder, which are not verified when the checkpoint is read.
            best: step of a checkpoint that is kept.

        Raises:
            OSError: the disk is full or cannot be written. The older checkpoints remain complete.
        """

        def fill(folder: Path) -> None:
            files = {}

            def add(name: str, content: bytes) -> None:
                files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                _write(folder / name, content)

            extra(folder)
            for name, tensors in checkpoint.tensors.items():
                add(f"{name}.safetensors", save(_plain(tensors), {"format": "pt"}))
            add(STATE, json.dumps({"step": checkpoint.step, **checkpoint.state}).encode())
            _write(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())

        target = self.folder / f"step-{checkpoint.step:09d}"
        if os.path.lexists(target):
            self._set_aside(target)
        write_folder(target, fill)
        self.rotate(best)

    def rotate(self, best: int | None = None) -> None:
        """Removes checkpoints that are older than the newest `keep` complete ones, except for that of step `best`."""
        remove_unfinished(self.folder)
        names = self.names()
        kept = [folder for folder in names if _looks_complete(folder)][-self.keep :]
        for old in names:
            if kept and _step_of(old.name) < _step_of(kept[0].name) and _step_of(old.name) != best:
                # The folder is renamed first, so that no incomplete checkpoint has a checkpoint's name.
                temporary = old.with_name(TEMPORARY + old.name)
                try:
                    old.rename(temporary)
                    sync(self.folder)
                    remove(temporary)
                except OSError as error:  # tried again after the next checkpoint
                    say(f"checkpoint {old} could not be removed: {error}")

    def newest(self) -> Checkpoint | None:
        """Reads the newest complete checkpoint; `None` if there is no checkpoint.

        Damaged checkpoints that are newer are reported and renamed to `damaged-...`.

        Raises:
            ValueError: all checkpoints are damaged, including those that were renamed before.
            OSError: the disk cannot read a checkpoint, which may be intact.
        """
        errors: dict[Path, ValueError] = {}
        for folder in reversed(self.names()):
            try:
                found = read_checkpoint(folder)
            except ValueError as error:
                errors[folder] = error
                continue
            for path, reason in errors.items():
                aside = self._set_aside(path)
                say(f"{reason}; renamed to {aside.name}, using {folder.name} instead")
            return found
        for reason in errors.values():
            say(str(reason))
        unusable = [*reversed(self._folders(_ASIDE)), *errors]
        if unusable:
            raise ValueError(
                f"no checkpoint in {self.folder} can be used: {', '.join(path.name for path in unusable)} are damaged; "
                "start again in another --output-dir"
            )
        return None

    def weights(self, step: int) -> dict[str, Tensor]:
        """The weights of the student in the checkpoint of a step.

        Raises:
            ValueError: the checkpoint is damaged.
            OSError: the disk cannot read it.
        """
        return read_checkpoint(self.folder / f"step-{step:09d}").tensors["model"]

    def _set_aside(self, path: Path) -> Path:
        """Renames a damaged checkpoint, so that its name is free and it does not count as one."""
        for number in itertools.count(1):
            aside = path.with_name(f"{DAMAGED}{path.name}" + (f".{number}" if number > 1 else ""))
            if not os.path.lexists(aside):
                break
        try:
            path.rename(aside)
            sync(self.folder)
        except OSError as error:
            raise write_error(error, aside) from error
        return aside


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint. Files that its manifest does not list are ignored.

    Raises:
        ValueError: the checkpoint is damaged. The message names the problem.
        OSError: the disk cannot read it.
    """
    try:
        manifest = read_file(folder / MANIFEST)
        files = _listed(manifest)
        for name, expected in files.items():
            size, digest = _measured(folder / name)
            if size != expected["bytes"]:
                raise ValueError(f"{name} has {size} bytes, expected {expected['bytes']}")
            if digest != expected["sha256"]:
                raise ValueError(f"{name} has a wrong checksum")
        state = json.loads(read_file(folder / STATE))
        step = state.pop("step")
        if type(step) is not int or step != _step_of(folder.name):
            raise ValueError(f"{STATE} is of step {step!r}")
        names = [Path(name) for name in files if name != STATE]
        tensors = {name.stem: load_file(folder / name) for name in sorted(names)}
    except _DAMAGE as error:
        raise damaged(folder, error) from error
    except OSError as error:
        raise OSError(
            error.errno, f"checkpoint {folder} cannot be read: {error}; nothing was changed, try again later"
        ) from error
    return Checkpoint(step, state, tensors, folder, hashlib.sha256(manifest).hexdigest())


def damaged(folder: Path | None, error: Exception) -> ValueError:
    """The exception for a checkpoint with wrong content."""
    reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return ValueError(f"checkpoint {folder} is damaged: {reason}")


def _listed(manifest: bytes) -> dict[str, dict[str, Any]]:
    """The files of a manifest, by name. Raises one of `_DAMAGE` if the manifest is invalid or of another version."""
    content = json.loads(manifest)
    if content["format"] != FORMAT:
        raise ValueError(f"written in format {content['format']}, this version reads {FORMAT}")
    files = content["files"]
    strange = [name for name in files if name != STATE and not re.fullmatch(r"[a-z]+\.safetensors", name)]
    if STATE not in files or strange:
        raise ValueError(f"{MANIFEST} lists {strange or 'no ' + STATE}")
    return files


def _looks_complete(folder: Path) -> bool:
    """True if all files exist and have the right size. The content is not read."""
    try:
        files = _listed(read_file(folder / MANIFEST))
        return all((folder / name).stat().st_size == expected["bytes"] for name, expected in files.items())
    except (*_DAMAGE, OSError):
        return False


def _measured(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a regular file."""
    total = hashlib.sha256()
    size = 0
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            total.update(block)
            size += len(block)
    return size, total.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a regular file's content."""
    return _measured(path)[1]


def _step_of(name: str) -> int:
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else -1


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no storage, as safetensors requires."""
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(storage.data_ptr())
        plain[name] = tensor
    return plain


def write_error(error: Exception, target: Path) -> OSError:
    """The exception for a failed write, with advice. safetensors and tokenizers report the system's error as text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    if number in _FULL:
        return OSError(
            number,
            f"the disk is full: {target} could not be written. What was complete before is intact: make room and "
            f"continue, a training run with --resume-from-checkpoint ({error})",
        )
    return OSError(number or errno.EIO, f"{target} could not be written: {error}")
