"""Lets a CUDA build of torch start without NVIDIA's libraries.

The libraries take gigabytes, and no operator on CPU tensors calls them. They are replaced by libraries of the same
names and symbols whose functions return 0.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout


def add_stand_ins(folder: Path) -> list[str]:
    """Adds the missing libraries to `folder`, torch's lib folder; returns their names."""
    libraries = sorted(folder.glob("*.so*"))
    needed, undefined, defined = set(), set(), set()
    for library in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-d", str(library))))
        for line in _output("nm", "-D", str(library)).splitlines():
            kind, symbol = line.split()[-2:]
            (undefined if kind == "U" else defined).add(symbol)
    missing = sorted(x for x in needed - {p.name for p in libraries} if re.match(r"lib(cu|nv|nccl)", x))
    defined = {symbol.partition("@")[0] for symbol in defined}
    symbols: dict[str, dict[str, list[str]]] = {name: {} for name in missing}
    for symbol in sorted(undefined):
        name, _, version = symbol.partition("@")
        if missing and name not in defined and not re.match("GLIBC|GCC|CXXABI|GOMP|OMP", version):
            # Symbol versions are named after their libraries. A symbol without a version may be in any library.
            symbols[version if version in missing else missing[0]].setdefault(version, []).append(name)
    for library, versions in symbols.items():
        source, script = folder / "stand_in.s", folder / "stand_in.map"
        names = [name for group in versions.values() for name in group]
        source.write_text(
            "\n".join(f".globl {x}\n.type {x}, @function\n{x}: xor %eax, %eax\n ret" for x in names) + "\n",
            encoding="ascii",
        )
        script.write_text(
            "\n".join(f"{v} {{ {'; '.join(group)}; }};" for v, group in versions.items() if v) + "\n", encoding="ascii"
        )
        options = [f"-Wl,-soname,{library}"] + ([f"-Wl,--version-script={script}"] if any(versions) else [])
        _output("cc", "-shared", "-nostdlib", str(source), *options, "-o", str(folder / library))
        source.unlink()
        script.unlink()
    return missing
