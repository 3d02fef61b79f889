"""Compiles native code for the emulator and caches it, by its inputs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
LIMIT = 600  # seconds that one compiler may take
FOLDER = Path(__file__).parents[2] / "build" / "ptx"  # default folder for compiled code


def kept(folder: Path, name: str, inputs: Iterable[Path | str], make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` has filled. `make` runs again if the inputs (contents of files, and words) change.

    The folder is created atomically, so that several processes can build it at the same time.
    """
    digest = hashlib.sha256()
    for given in inputs:
        digest.update(given.name.encode() + given.read_bytes() if isinstance(given, Path) else given.encode())
        digest.update(b"\0")
    place = folder / f"{name}-{digest.hexdigest()[:16]}"
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
        try:
            make(fresh)
            fresh.rename(place)
        except OSError:
            if not place.exists():  # another process was faster
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return place


def compiled(command: list[str], what: str) -> None:
    """Runs a compiler."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if result.returncode:
        raise RuntimeError(f"{what} does not build: {' '.join(command)}\n{result.stderr[-3000:]}")
