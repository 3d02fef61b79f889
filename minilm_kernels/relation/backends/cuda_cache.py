"""On-disk cache of compiled CUDA kernels. Each kernel has one file, named by a digest of all inputs of its compilation.

Cached code runs on the GPU. The cache therefore only uses a folder and files that belong to the current user and that
no other user can write to. It verifies the SHA-256 of each file and creates files atomically by renaming them. If the
folder cannot be used, the cache logs one warning, and kernels are compiled again. Results never depend on the cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
VARIABLE = "MINILM_KERNELS_CACHE"
_SUFFIX = ".kernel"
_TEMPORARY = ".unfinished-"
_STALE_SECONDS = 3600  # older temporary files were left by processes that died
_MAGIC = b"minilm_kernels compiled kernel 1\n"


def default_folder() -> Path:
    """Returns $MINILM_KERNELS_CACHE, or `minilm_kernels` in the user's cache folder."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "minilm_kernels"


class KernelCache:
    """Compiled kernels in a folder, by digest. If the folder cannot be used, `get` and `put` do not raise."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self._warned = False
        self._warning = threading.Lock()  # several threads compile and store kernels
        self._unstored: dict[str, bytes] = {}

    def get(self, digest: str) -> bytes | None:
        """Returns a kernel's code, or `None` if it is missing, damaged, or not owned by this user."""
        if digest in self._unstored:
            return self._unstored[digest]
        try:
            with self._opened(create=False) as folder:
                return _read(digest + _SUFFIX, folder)[1]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder
            self._warn(f"reading {digest[:12]}…: {error}")
            return None

    def put(self, digest: str, code: bytes, about: dict[str, Any]) -> None:
        """Stores a kernel's code, and its description for `entries`.

        If the folder cannot be used, the code is kept in memory.
        """
        temporary = f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with self._opened(create=True) as folder:
                try:
                    _write(temporary, folder, code, about)
                    os.rename(temporary, digest + _SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=folder)
                    raise
        except (OSError, RuntimeError) as error:
            self._unstored[digest] = code
            self._warn(f"writing: {error}")

    def entries(self) -> list[dict[str, Any]]:
        """Returns the description of each usable kernel in the folder, with its size as `bytes`. Raises `OSError`."""
        found = []
        with suppress(FileNotFoundError), self._opened(create=False) as folder:
            for name in sorted(_names(folder)):
                if name.endswith(_SUFFIX):
                    with suppress(OSError, ValueError):
                        about, code = _read(name, folder)
                        found.append({**about, "bytes": len(code)})
        return found

    def clear(self) -> int:
        """Removes all kernels and leftover temporary files. Returns the number of files. Raises `OSError`."""
        removed = 0
        with suppress(FileNotFoundError), self._opened(create=False) as folder:
            for name in _names(folder):
                if name.endswith(_SUFFIX) or name.startswith(_TEMPORARY):
                    os.unlink(name, dir_fd=folder)
                    removed += 1
        return removed

    @contextmanager
    def _opened(self, create: bool) -> Iterator[int]:
        """Yields a file descriptor of the folder, so that nobody can replace the folder during the operation."""
        if create and not self.folder.is_dir():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _check_own(os.fstat(handle), "the folder")
            if create:
                _remove_stale(handle)
            yield handle
        finally:
            os.close(handle)

    def _warn(self, problem: str) -> None:
        with self._warning:
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "the cache of compiled CUDA kernels in %s cannot be used (%s): every process compiles its own kernels; "
                "set %s to use another folder",
                self.folder,
                problem,
                VARIABLE,
            )


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _check_own(status: os.stat_result, what: str) -> None:
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{what} belongs to another user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write to {what}; use chmod go-w to make it private")


def _read(name: str, folder: int) -> tuple[dict[str, Any], bytes]:
    """Returns a kernel's description and code. Raises `OSError`, or `ValueError` if the file is damaged."""
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        _check_own(status, f"the file {name}")
        content = file.read()
    size = len(_MAGIC) + hashlib.sha256().digest_size
    if not content.startswith(_MAGIC) or hashlib.sha256(content[size:]).digest() != content[len(_MAGIC) : size]:
        raise ValueError("the file is damaged, or belongs to another program")
    about, _, code = content[size:].partition(b"\n")
    return json.loads(about), code


def _write(name: str, folder: int, code: bytes, about: dict[str, Any]) -> None:
    body = json.dumps(about).encode() + b"\n" + code
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(_MAGIC + hashlib.sha256(body).digest() + body)
        file.flush()
        os.fsync(handle)


def _remove_stale(folder: int) -> None:
    """Removes temporary files of processes that died while writing."""
    for name in _names(folder):
        if name.startswith(_TEMPORARY):
            with suppress(OSError):
                if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > _STALE_SECONDS:
                    os.unlink(name, dir_fd=folder)
