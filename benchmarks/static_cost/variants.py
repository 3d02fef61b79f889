"""The kernels whose cost is counted: their declarations, and their compilation without a GPU.

The declarations are `variants()` in triton_loops.py and cuda_loops.py. docs/static-cost.md explains the fields. The
package does not import this module.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from minilm_kernels.relation.backends import cuda_compiler

from . import sass

TRITON_MODULE = "benchmarks.static_cost.triton_loops"
CUDA_MODULE = "benchmarks.static_cost.cuda_loops"


@dataclass(frozen=True)
class Work:
    """The work of a source loop for one head of a sequence of S tokens."""

    turns: float
    pairs: float  # ordered pairs of all turns; the parts of a phase have all S² of them
    executed: float = 1  # share of a turn's conditional code that is executed, on average
    entries: float = 0  # executions of the enclosing loop's own code


@dataclass(frozen=True)
class SourceLoop:
    """The work of one iteration of a source loop for the whole block, or for one warp."""

    phase: str  # "lse", "grad", ...: the phases of a group add up to loss and gradient
    pairs: float  # ordered pairs; a tile of unordered pairs counts twice
    exponentials: int = 0  # elements that go through ex2
    tensor_macs: int = 0  # multiply-adds on tensor cores, widths padded as compiled; 0: not declared
    marker: str = ""  # tags of the machine loop, joined by "+"; "": the only loop with exponentials
    trips: float = 0  # turns per entry of the loop, at S = 512 if they depend on S; 0: unknown
    per: str = "block"  # the counts are of a "block" or of a "warp"
    copies: int = 1  # machine loops of this source loop that share its pairs evenly, as below and above a diagonal
    part: str = ""  # "": most pairs of the phase; "diagonal", "tail", ...: those that other loops compute
    conditional: bool = False  # the exponentials are in branches, of which an iteration executes a share (Work)
    l2_bytes: float = 0  # bytes that an iteration reads and writes in global memory, each once
    work: Callable[[int], Work | None] | None = None  # by the length of the sequence; None: another kernel serves it
    looped_macs: int = 0  # ordinary multiply-adds of loops inside, which the compiler may unroll; 0: no such loops


@dataclass(frozen=True)
class Built:
    """A compiled kernel."""

    function: sass.Function
    resources: sass.Resources
    warps: int
    shared_bytes: int


@dataclass(frozen=True)
class Variant:
    backend: str
    kernel: str
    group: str  # the costs of the variants in a group add up; alternatives belong to different groups
    dtype: str
    d_t: int
    d_s: int
    loops: tuple[SourceLoop, ...]
    build: Callable[[], Built]

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.group}] {self.dtype} {self.d_t}x{self.d_s}"


def triton_variants(arch: str, module: str) -> list[Variant]:
    """Kernels that `variants(90)` of the module declares for "sm_90"."""
    number = int(arch.removeprefix("sm_"))
    try:
        declared = importlib.import_module(module).variants(number)
    except ModuleNotFoundError as missing:
        raise ValueError(f"no Triton kernels: {missing}") from missing
    return [triton_variant(item, number) for item in declared]


def cuda_variants(arch: str, module: str = CUDA_MODULE) -> list[Variant]:
    """Kernels that `variants(90)` of the module declares, or those of a JSON file, compiled for "sm_90"."""
    if module.endswith(".json"):
        declared, folder = json.loads(Path(module).read_text()), Path(module).parent
    else:
        declared, folder = importlib.import_module(module).variants(int(arch.removeprefix("sm_"))), Path()
    return [cuda_variant(item, arch, folder) for item in declared]


def triton_variant(item: Any, arch: int) -> Variant:
    """A declared Triton kernel, for an architecture such as 90."""
    return _variant("triton", item, partial(build_triton, item, arch))


def cuda_variant(item: Any, arch: str, folder: Path = Path()) -> Variant:
    """A declared CUDA C++ kernel, for "sm_90" or another architecture. Its `source`, if any, is in the folder."""
    return _variant("cuda", item, partial(build_cuda, item, arch, folder))


def _variant(backend: str, item: Any, build: Callable[[], Built]) -> Variant:
    loops = []
    for loop in _get(item, "loops"):
        if isinstance(loop, SourceLoop):
            loops.append(loop)
            continue
        given = {field.name: _get(loop, field.name, None) for field in fields(SourceLoop)}
        loops.append(SourceLoop(**{name: value for name, value in given.items() if value is not None}))
    plain = {name: _get(item, name) for name in ("kernel", "dtype", "d_t", "d_s")}
    return Variant(backend, group=_get(item, "group", "self"), loops=tuple(loops), build=build, **plain)


_REQUIRED: Any = object()


def _get(item: Any, name: str, default: Any = _REQUIRED) -> Any:
    """A field of a dataclass, a named tuple or a dict."""
    value = item.get(name, default) if isinstance(item, dict) else getattr(item, name, default)
    if value is _REQUIRED:
        raise ValueError(f"variant {item!r}: expected a field {name!r}")
    return value


def triton_source(item: Any) -> Any:
    """Returns the source of a variant with its argument types, constants and attributes, as Triton compiles it."""
    import triton
    from triton.compiler import ASTSource

    function = _get(item, "fn")
    if not isinstance(function, triton.JITFunction):
        raise ValueError(f"{function}: expected a function compiled by triton.jit; unset TRITON_INTERPRET")
    signature = dict(_get(item, "signature"))
    places: list[tuple[int, ...]] = []  # positions of arguments, or of the elements of a tuple
    for name in _get(item, "divisible_by_16", ()):
        number, kind = function.arg_names.index(name), signature[name]
        places += [(number, k) for k in range(len(kind))] if isinstance(kind, tuple) else [(number,)]
    attributes = {place: [["tt.divisibility", 16]] for place in places}
    return ASTSource(function, signature, dict(_get(item, "constants")), attributes)


def compile_triton(item: Any, arch: int) -> Any:
    """Returns the kernel that Triton compiles for an architecture such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton_source(item)
    with triton.knobs.cache.scope():
        # Triton's cache finds a kernel by its text alone. A kernel of another checkout has other paths in its lines.
        checkout = hashlib.sha256(str(inspect.getsourcefile(source.fn.fn)).encode()).hexdigest()[:16]
        triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / f"static-{checkout}")
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(_get(item, "options", {})))


def build_triton(item: Any, arch: int) -> Built:
    kernel = compile_triton(item, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        functions, resources = sass.disassemble(cubin)
    name = kernel.metadata.name
    return Built(functions[name], resources[name], kernel.metadata.num_warps, kernel.metadata.shared)


def build_cuda(item: Any, arch: str, folder: Path) -> Built:
    pattern, source = _get(item, "symbol"), _get(item, "source", None)
    number = int(arch.removeprefix("sm_"))
    functions, resources = _package_cubin(pattern, number) if source is None else _file_cubin(folder / source, number)
    readable = sass.demangle(sorted(functions))
    names = [name for name in functions if re.search(pattern, readable[name])]
    if len(names) != 1:
        found = "\n  ".join(readable[name] for name in names or functions)
        raise ValueError(f"symbol {pattern!r}: expected one kernel, {len(names)} match; of\n  {found}")
    usage = resources[names[0]]
    reserved = 1024 if number >= 90 and usage.shared else 0
    dynamic = (_get(item, "dynamic_shared", None) or {}).get("512", 0)
    return Built(functions[names[0]], usage, _get(item, "warps"), usage.shared - reserved + dynamic)


@cache
def _package_cubin(kernel: str, arch: int) -> tuple[dict, dict]:
    return _disassembled(cuda_compiler.compile_kernels([kernel], arch, line_info=True)[kernel])


@cache
def _file_cubin(file: Path, arch: int) -> tuple[dict, dict]:
    """All kernels of a file."""
    text = f'#line 1 "{file.resolve()}"\n{file.read_text(encoding="utf-8")}'
    options = [*cuda_compiler.OPTIONS, "-lineinfo"]
    return _disassembled(cuda_compiler.compile_text(text, file.name, arch, "cubin", options))


def _disassembled(code: bytes) -> tuple[dict, dict]:
    with tempfile.TemporaryDirectory() as temporary:
        cubin = Path(temporary) / "kernels.cubin"
        cubin.write_bytes(code)
        return sass.disassemble(cubin)
