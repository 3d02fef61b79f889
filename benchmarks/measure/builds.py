"""Other versions of the package: built from a source tree, and measured by this tree's benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def call(command: Sequence[object], what: str, **options: Any) -> None:
    """Run a command. If it fails, raise ValueError with the end of its output."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if result.returncode:
        raise ValueError(f"{what} failed: {(result.stderr.strip() or result.stdout.strip())[-2000:]}")


def build(tree: Path, folder: Path) -> Path:
    """Build the package of a source tree. Return a folder that contains it and the benchmarks of this tree."""
    root = folder / "root"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", folder / "objects", "--build-lib", root]
    call(command, f"building {tree}", cwd=tree)
    for name in ("benchmarks", "examples"):
        (root / name).symlink_to(Path(__file__).parents[2] / name)
    return root


def measure(root: Path, options: Sequence[str], file: Path, **environment: str) -> None:
    """Run `python -m benchmarks run` in a folder with the package, and append the records to a file."""
    command = [sys.executable, "-m", "benchmarks", "run", *options, "--out", file]
    call(command, f"measuring {root}", cwd=root, env=os.environ | {"PYTHONPATH": str(root)} | environment)
