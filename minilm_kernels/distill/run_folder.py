"""The output folder of a run: its lock, its names, and checks that a run may write to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .checkpoint import make_folder, read_file, remove_unfinished, write_error, write_file
from .config import DistillConfig
from .console import say
from .distributed import DistContext

SETTINGS = "settings.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
STUDENT = "student"
TOKENS = "tokens"
# Errors of flock on file systems without locks. 524 is ENOTSUPP, which NFS returns.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, 524}


@contextmanager
def output_folder(config: DistillConfig, dist: DistContext) -> Iterator[Path]:
    """Creates and locks the folder of a run, and removes temporary files of a killed run.

    Raises:
        ValueError: the folder contains another run, or something else that the run would overwrite.
        RuntimeError: another process is running in the folder.
        OSError: the folder cannot be written.
    """
    output = Path(config.output_dir)
    lock: BinaryIO | None = None

    def contains_run() -> bool:
        names = (SETTINGS, METRICS, CHECKPOINTS, STUDENT)
        found = [name for name in names if os.path.lexists(output / name) and not _is_empty_folder(output / name)]
        if found and not config.resume_from_checkpoint:
            raise ValueError(
                f"--output-dir: {output} contains another run ({', '.join(found)}); "
                "continue it with --resume-from-checkpoint, or choose another folder"
            )
        return bool(found)

    def prepare() -> None:
        nonlocal lock
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output-dir: {output} is a file, expected a folder")
        contains_run()  # before anything is written into a folder of another run
        try:
            make_folder(output)
            lock = lock_folder(output)
        except OSError as error:
            raise write_error(error, output) from error
        if contains_run():  # again, because another run may have ended before the lock was free
            refuse_differences(config, config.differences(_settings_of(output)))
        checkpoints = output / CHECKPOINTS
        if os.path.lexists(checkpoints) and not checkpoints.is_dir():
            raise ValueError(f"--output-dir: {checkpoints} is not a folder; move it away to make room for checkpoints")
        for folder in (output, checkpoints):
            remove_unfinished(folder)

    try:
        dist.on_main(prepare)
        yield output
    finally:
        if lock is not None:
            lock.close()


def is_finished(student: Path) -> bool:
    """True if the student has been written. Raises `ValueError` if something else is in its place."""
    if (student / "config.json").is_file() and any(student.glob("*.safetensors")):
        return True
    if os.path.lexists(student) and not _is_empty_folder(student):
        raise ValueError(
            f"--output-dir: {student} is neither a finished student nor an empty folder; move it away to make room for "
            "the student"
        )
    return False


def refuse_differences(config: DistillConfig, differences: list[str]) -> None:
    """Raises `ValueError` if there are differences from the settings of the run in the folder."""
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"--resume-from-checkpoint: {config.output_dir} contains a run with other settings; use the same settings, "
            f"or another --output-dir:\n  {listed}"
        )


def write_settings(config: DistillConfig) -> None:
    """Writes the settings of a run into its folder, which then contains a run. Raises `OSError`."""
    settings = json.dumps(config.as_dict(), indent=1) + "\n"
    write_file(Path(config.output_dir) / SETTINGS, settings.encode())


def _settings_of(output: Path) -> dict[str, Any]:
    """The settings of the run in a folder."""
    try:
        settings = json.loads(read_file(output / SETTINGS))
        if not isinstance(settings, dict):
            raise TypeError(f"expected an object, got {type(settings).__name__}")
        return settings
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"--resume-from-checkpoint: {output} contains a run without readable {SETTINGS} ({error}); choose another "
            "folder"
        ) from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def lock_folder(folder: Path, option: str = "--output-dir") -> BinaryIO:
    """Locks a folder with a file that names host and process, until the file is closed.

    Args:
        option: the option that names the folder, for messages.

    Raises:
        ValueError: something else has the file's name.
        RuntimeError: another process holds the lock.
        OSError: the file cannot be written.
    """
    path = folder / ".lock"
    if path.is_symlink():
        raise ValueError(f"{option}: {path} is a symbolic link; remove it")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    lock = open(handle, "r+b", buffering=0)  # noqa: PTH123, SIM115
    os.register_at_fork(after_in_child=partial(_close, weakref.ref(lock)))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{option}: {path} is not a regular file; remove it")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock.read(200).decode("utf-8", "replace").strip()
            raise RuntimeError(
                f"{option}: another process is running in {folder}" + (f" ({holder})" if holder else "")
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, f"{option}: {path} cannot be locked: {error.strerror}") from error
            say(f"{option}: {folder} has no file locks ({error.strerror}); make sure that only one run uses it")
        with suppress(OSError):  # only for the error message above
            lock.truncate(0)
            lock.write(f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
    except BaseException:
        lock.close()
        raise
    return lock


def _close(lock: weakref.ref[BinaryIO]) -> None:
    """Closes the lock in a forked process, which would otherwise keep it after the end of its parent."""
    if (file := lock()) is not None:
        file.close()
