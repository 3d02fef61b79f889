"""Compiles the kernels of csrc/cuda/device with NVRTC, which is part of every CUDA build of PyTorch.

A kernel is compiled for the shape of a call. Its name contains the template arguments: `symmetric_1_2_1_1_0` is the
template `symmetric` of device/kernels.cuh with the arguments 1, 2, 1, 1, 0 (csrc/cuda/host/launch_plan.cpp makes the
names). Compiling needs neither a GPU nor a CUDA toolkit; see docs/cuda.md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .cuda_cache import KernelCache

_log = logging.getLogger(__name__)
_INSTALLED = Path(__file__).parents[2] / "cuda_device"  # setup.py copies the sources and csrc/common there
_CHECKOUT = Path(__file__).parents[3] / "csrc" / "cuda" / "device"
OLDEST = 80  # the first compute capability with bfloat16 tensor cores, 8.0
_NAME = re.compile(r"(symmetric|segments|row_stats|row_wise)((?:_\d+){5})|(reduce|sequences|weights|scale)")
SHARED = ("reduce", "sequences", "weights", "scale")  # kernels that do not depend on widths and dtypes
_SPLITS = {"bfloat16": 1, "float16": 2, "float32": 3}  # number of bfloat16 terms that represent a number
_FORMATS = {"bfloat16": 1, "float16": 4, "float32": 5}  # in the symmetric path; csrc/cuda/device/launch_params.h


class CompilerError(RuntimeError):
    """Kernels cannot be compiled. The message has the reason. `kernel`: the only one concerned, or None."""

    def __init__(self, reason: str, kernel: str | None = None) -> None:
        super().__init__(reason)
        self.kernel = kernel


class Kernel(NamedTuple):
    """A compiled kernel."""

    name: str
    code: bytes  # machine code, or zero-terminated PTX, which the driver compiles
    seconds: float  # compile time; 0 for a kernel from the cache


def unavailable_reason() -> str | None:
    """Returns why kernels cannot be compiled, and how to fix it; `None` if they can."""
    if not (_INSTALLED.is_dir() or _CHECKOUT.is_dir()):
        return f"the kernels' sources are not in {_INSTALLED}: reinstall the package"
    try:
        found = importlib.util.find_spec("cuda.bindings")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "NVIDIA's Python bindings are not installed: pip install cuda-bindings, of PyTorch's CUDA version"
    try:
        _nvrtc()
    except CompilerError as error:
        return str(error)
    return None


def compile_kernels(
    names: Sequence[str],
    architecture: int,
    *,
    cache: KernelCache | None = None,
    target: str | None = None,
    line_info: bool = False,
    each: Callable[[Kernel], None] = lambda kernel: None,
) -> dict[str, bytes]:
    """Returns the code of each kernel, from the cache or compiled by NVRTC in parallel.

    Args:
        names: kernel names, as made by csrc/cuda/host/launch_plan.cpp or `kernel_names`.
        architecture: compute capability of the GPU, 90 for 9.0.
        cache: stores compiled kernels; `None` disables caching.
        target: "cubin" or "ptx"; `None` means machine code, or PTX if the GPU is newer than NVRTC.
        line_info: include source line numbers for profilers, which makes the code three times as large.
        each: function that is called with each kernel as soon as it is ready.

    Returns:
        The code by kernel name.

    Raises:
        CompilerError: NVRTC cannot be loaded, or compilation failed; the message has its log.
    """
    if reason := unavailable_reason():
        raise CompilerError(reason)
    began = time.perf_counter()
    options = [*OPTIONS, *(["-lineinfo"] if line_info else [])]
    requested = architecture
    architecture, target = _target(architecture, target)
    kernels: dict[str, bytes] = {}
    todo = []
    for name in names:
        key = _digest(name, architecture, target, options)
        code = cache.get(key) if cache else None
        if code is None:
            todo.append((name, key))
        else:
            kernels[name] = code
            each(Kernel(name, code, 0.0))

    def compile_one(item: tuple[str, str]) -> Kernel:
        name, key = item
        start = time.perf_counter()
        code = _compile(name, architecture, target, options)
        kernel = Kernel(name, code, time.perf_counter() - start)
        if cache:
            about = {"name": name, "requested": requested, "architecture": architecture, "target": target}
            cache.put(key, code, {**about, "nvrtc": _version()})
        return kernel

    if todo:
        with ThreadPoolExecutor(min(len(todo), _processors()), "minilm-nvrtc") as pool:
            for kernel in pool.map(compile_one, todo):
                kernels[kernel.name] = kernel.code
                each(kernel)
        listed = ", ".join(name for name, _ in todo)
        _log.info("compiled %s for sm_%d in %.1f s", listed, architecture, time.perf_counter() - began)
    return kernels


def kernel_names(width_t: int, width_s: int, dtype_t: str = "bfloat16", dtype_s: str = "bfloat16") -> list[str]:
    """Names of all kernels that losses with these head widths may need, for any mask, length and reduction."""
    chunks_t, chunks_s = (-(-width // 8) for width in (width_t, width_s))
    format_t, format_s = (_FORMATS[dtype] for dtype in (dtype_t, dtype_s))
    own = f"{format_s}_{chunks_t}_{format_t}_{chunks_s}"
    names = [f"{kind}_{own}_{causal}" for kind in ("symmetric", "segments") for causal in (0, 1)]
    splits_t, splits_s = _SPLITS[dtype_t], _SPLITS[dtype_s]
    shape = f"{chunks_t}_{splits_t}_{chunks_s}_{splits_s}"
    names += [f"row_stats_1_{shape}", f"row_wise_0_{shape}"]
    # Self relations with gradient have another format of float32 tokens than cross relations. The approximate
    # exponential (exact = 0) is used for training in half precision only.
    both_t, both_s = (
        _FORMATS[dtype] if splits == 3 else splits for dtype, splits in ((dtype_t, splits_t), (dtype_s, splits_s))
    )
    for trained in (shape, f"{chunks_t}_{both_t}_{chunks_s}_{both_s}"):
        names += [f"row_stats_{int(splits_s == 3)}_{trained}", f"row_wise_{splits_s}_{trained}"]
    return [*dict.fromkeys(names), *SHARED]


@cache
def source(places: bool = False) -> str:
    """All device code as one text. Line directives name the files, by their full paths if `places` is True."""
    folders = [_CHECKOUT, _CHECKOUT.parents[1]] if _CHECKOUT.is_dir() else [_INSTALLED]  # [1]: csrc, which has common/
    return _inlined("kernels.cuh", folders, set(), places)


def _inlined(name: str, folders: Sequence[Path], seen: set[str], places: bool) -> str:
    """The text of a file with each included file inserted at its first include; later includes of it are removed."""
    path = next(folder / name for folder in folders if (folder / name).exists())
    label = str(path) if places else name
    lines = [f'#line 1 "{label}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        include = re.fullmatch(r'#include "([\w./]+)"', line)
        if include and any((folder / include[1]).exists() for folder in folders):
            if include[1] not in seen:
                seen.add(include[1])
                lines += [_inlined(include[1], folders, seen, places), f'#line {number + 1} "{label}"']
            else:
                lines.append("")
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


def _entry(name: str) -> str:
    """The macro of kernels.cuh that defines a kernel."""
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ValueError(f"name: expected a kernel name such as symmetric_1_2_1_1_0, got {name!r}")
    kind, arguments = parts[1] or parts[3], (parts[2] or "").split("_")[1:]
    return f"MINILM_{kind.upper()}({', '.join([name, *arguments])})"


OPTIONS = ("-std=c++17", "-default-device")  # -default-device makes lambdas device functions


def _digest(name: str, architecture: int, target: str, options: Sequence[str]) -> str:
    parts = (source(), _entry(name), *options, _version(), architecture, target)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _compile(name: str, architecture: int, target: str, options: Sequence[str]) -> bytes:
    text = f'{source("-lineinfo" in options)}\n#line 1 "{name}"\n{_entry(name)}\n'
    return compile_text(text, name, architecture, target, options)


def compile_text(text: str, name: str, architecture: int, target: str, options: Sequence[str]) -> bytes:
    """Compiles CUDA C++ to machine code ("cubin") or zero-terminated PTX ("ptx").

    Raises:
        CompilerError: compilation failed; the message has NVRTC's log.
    """
    nvrtc = _nvrtc()
    kind = "compute" if target == "ptx" else "sm"
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])
    if status.value:
        raise CompilerError(f"nvrtcCreateProgram failed: {status.name}")
    try:
        arguments = [f"--gpu-architecture={kind}_{architecture}".encode(), *(option.encode() for option in options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        if status.value:
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            raise CompilerError(
                f"NVRTC {_version()} could not compile {name} for {kind}_{architecture}: {status.name}\n"
                + log.strip("\0\n "),
                name,
            )
        if target == "ptx":
            return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(size_of: Any, read: Any, program: Any) -> bytes:
    status, size = size_of(program)
    content = b" " * size
    (failed,) = read(program, content)
    if status.value or failed.value:
        raise CompilerError(f"NVRTC returned no result: {status.name}, {failed.name}")
    return content


@cache
def _nvrtc() -> Any:
    """NVIDIA's Python bindings of NVRTC, which find and load the library."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # the library is missing, or has another major version
        raise CompilerError(
            f"NVRTC, CUDA's compiler library, cannot be loaded ({error}). CUDA builds of PyTorch include it; "
            "otherwise: pip install cuda-bindings nvidia-cuda-nvrtc, of PyTorch's CUDA version"
        ) from error
    return nvrtc


@cache
def _version() -> str:
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def _target(architecture: int, target: str | None) -> tuple[int, str]:
    """Architecture and target for a GPU: its machine code or, if NVRTC is older, PTX of NVRTC's newest architecture."""
    known = [number for number in _nvrtc().nvrtcGetSupportedArchs()[-1] if number >= OLDEST]
    if architecture in known:
        return architecture, target or "cubin"
    older = [number for number in known if number < architecture]
    if not older or target == "cubin":
        listed = ", ".join(f"sm_{number}" for number in known)
        raise CompilerError(f"NVRTC {_version()} compiles for {listed}, not for sm_{architecture}")
    return max(older), "ptx"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
