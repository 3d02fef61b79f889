"""Machine code as text: runs nvdisasm and cuobjdump on a cubin and parses what they print."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

Line = tuple[str, int]  # a source file and a line in it

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"\s*([.$\w]+):\s*$")
_SOURCE = re.compile(r'\s*//## File "([^"]*)", line (\d+)')
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: "MUFU.EX2"
    operands: str
    predicate: str = ""  # "P0", "!UP1", ...; "!PT" never executes
    lines: frozenset[Line] = frozenset()  # the source line and, where inlined, its call sites

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        return self.predicate not in ("", "PT", "UPT")


@dataclass
class Function:
    name: str  # mangled
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index into code


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int  # bytes per thread
    shared: int  # bytes per block: declared by the kernel and, from sm_90 on, 1 KiB that the system reserves
    local: int  # bytes per thread


def parse(text: str) -> dict[str, Function]:
    """Functions of `nvdisasm -c -gi`, by mangled name."""
    functions: dict[str, Function] = {}
    function = Function("")
    lines: set[Line] = set()
    fresh = True  # the next source comment starts a new location
    for row in text.splitlines():
        if section := _SECTION.match(row):
            function = functions.setdefault(section[1], Function(section[1]))
            lines = set()
        elif source := _SOURCE.match(row):
            lines = {(source[1], int(source[2]))} | (set() if fresh else lines)
            fresh = False
        elif label := _LABEL.match(row):
            function.labels[label[1]] = len(function.code)
        elif instruction := _INSTRUCTION.match(row):
            _, predicate, opcode, operands = instruction.groups()
            function.code.append(Instruction(opcode, operands, predicate or "", frozenset(lines)))
            fresh = True
    return functions


def parse_resources(text: str) -> dict[str, Resources]:
    """Functions of `cuobjdump -res-usage`, by mangled name."""
    found: dict[str, Resources] = {}
    name = ""
    for row in text.splitlines():
        if row.strip().startswith("Function "):
            name = row.strip().removeprefix("Function ").rstrip(":")
        elif name and (values := dict(_RESOURCE.findall(row))):
            found[name] = Resources(*(int(values[key]) for key in ("REG", "STACK", "SHARED", "LOCAL")))
            name = ""
    return found


def disassemble(cubin: Path) -> tuple[dict[str, Function], dict[str, Resources]]:
    code = _run(_tool("nvdisasm"), "-c", "-gi", str(cubin))
    usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
    return parse(code), parse_resources(usage)


def demangle(names: list[str]) -> dict[str, str]:
    """Maps mangled names to readable names."""
    filter_ = shutil.which("c++filt") or shutil.which("cu++filt")
    if filter_ is None:
        return {name: name for name in names}
    text = subprocess.run([filter_], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, text.splitlines(), strict=True))


def _tool(name: str) -> str:
    """The path of a tool: from the triton wheel, otherwise from PATH."""
    try:
        import triton
    except ImportError:
        pass
    else:
        inside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if inside.exists():
            return str(inside)
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in the triton wheel nor on the PATH: pip install triton")
    return found


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout
