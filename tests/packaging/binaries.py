"""What is inside a built library: the symbols it lacks, the libraries it names, the GPUs it has code for."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import native

_PART = struct.Struct("<HHIQ8xHHI")  # kind, version, header size, payload size, minor and major version, architecture
_KINDS = {1: "compute", 2: "sm"}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def symbols_from_elsewhere(library: Path) -> set[str]:
    """What the loader has to find outside; names of the C and C++ libraries, which carry a version, left out."""
    names = {line.split()[-1] for line in _output("nm", "-D", "--undefined-only", str(library)).splitlines()}
    optional = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    return {name for name in names - optional if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)}


def libraries_named_by(library: Path) -> set[str]:
    return set(re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-d", str(library))))


def stable_abi() -> set[str]:
    """The functions of PyTorch's stable ABI, as of the version that the libraries are built for."""
    include = native.find_torch().folder / "include"
    source = '#include "torch/csrc/inductor/aoti_torch/c/shim.h"\n#include "torch/csrc/stable/c/shim.h"\n'
    command = ["c++", "-E", "-P", "-x", "c++", "-std=c++17", native.STABLE_ABI, "-I", str(include), "-"]
    text = subprocess.run(command, input=source, capture_output=True, text=True, check=True, timeout=120).stdout
    names = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))
    assert len(names) > 100
    return names


def gpu_code(library: Path) -> set[str]:
    """Architectures with code in a library: machine code as sm_90, PTX as compute_90. Every source has the same."""
    data, found = library.read_bytes(), []
    start = data.find(b"\x50\xed\x55\xba")
    while start >= 0:
        header, size = struct.unpack_from("<HQ", data, start + 6)
        at, end = start + header, start + header + size
        parts = set()
        while at < end:
            kind, _, header, size, _, _, architecture = _PART.unpack_from(data, at)
            parts.add(f"{_KINDS[kind]}_{architecture}")
            at += header + size
        found.append(parts)
        start = data.find(b"\x50\xed\x55\xba", end)
    # The linker adds an empty one of its own for device code that is linked, of which there is none.
    found = [parts for parts in found if any(part.startswith("compute") for part in parts)] or found
    assert all(parts == found[0] for parts in found), found
    return found[0]
