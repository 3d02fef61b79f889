"""Reads the undefined symbols and the linked libraries of a built library."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import native


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def symbols_from_elsewhere(library: Path) -> set[str]:
    """The undefined symbols, without those of the C and C++ libraries.

    These have a version, unless torch's own libraries export them, too, as those of torch 2.11 do with parts of std.
    """
    names = {line.split()[-1] for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines()}
    optional = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    return {name for name in names - optional if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ZNK?St", name)}


def libraries_named_by(library: Path) -> set[str]:
    return set(re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-d", str(library))))


def stable_abi() -> set[str]:
    """The functions of PyTorch's stable ABI in the version that the libraries are built for."""
    include = native.find_torch().folder / "include"
    source = '#include "torch/csrc/inductor/aoti_torch/c/shim.h"\n#include "torch/csrc/stable/c/shim.h"\n'
    command = ["c++", "-E", "-P", "-x", "c++", "-std=c++17", native.STABLE_ABI, "-I", str(include), "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True, timeout=600).stdout
    names = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))
    assert len(names) > 100
    return names
