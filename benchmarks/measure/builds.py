"""Other versions of the package: built from a source tree, and measured by this tree's benchmarks."""

from __future__ import annotations

import os
import shutil
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


def copy_sources(folder: Path) -> None:
    """Copy everything from which the package is built."""
    for name in ("minilm_kernels", "csrc", "build_support"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def link_benchmarks(root: Path) -> None:
    """Let the package in a folder be measured by this tree's benchmarks."""
    for name in ("benchmarks", "examples"):
        (root / name).symlink_to(ROOT / name)


def build(tree: Path, folder: Path) -> Path:
    """Build the package of a source tree. Return a folder that contains it and the benchmarks of this tree."""
    root = folder / "root"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", folder / "objects", "--build-lib", root]
    call(command, f"building {tree}", cwd=tree)
    link_benchmarks(root)
    return root


def measure(root: Path, options: Sequence[str], file: Path, **environment: str) -> None:
    """Run `python -m benchmarks run` in a folder with the package, and append the records to a file."""
    command = [sys.executable, "-m", "benchmarks", "run", *options, "--out", file]
    call(command, f"measuring {root}", cwd=root, env=os.environ | {"PYTHONPATH": str(root)} | environment)
