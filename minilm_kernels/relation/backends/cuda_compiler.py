"""Compiles the kernels of csrc/cuda/device for the shape of a call, by NVRTC, which CUDA builds of PyTorch bring along.

A kernel's name is its recipe: `fused_1_2_1_1_0` is the template of device/kernels.cuh with these arguments
(csrc/cuda/host/plan.cpp makes the names). No GPU and no CUDA toolkit is needed to compile; see docs/cuda.md.
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
_INSTALLED = Path(__file__).parents[2] / "cuda_device"  # setup.py copies the sources there
_CHECKOUT = Path(__file__).parents[3] / "csrc" / "cuda" / "device"
OLDEST = 80  # compute capability: matrix products of bfloat16
_NAME = re.compile(r"(?:(?:fused|statistics|visit)(?:_\d+){5}|reduce)")
_PIECES = {"bfloat16": 1, "float16": 2, "float32": 3}  # bfloat16 terms that a number is split into


class CompilerError(RuntimeError):
    """Kernels cannot be compiled here, and why."""


class Kernel(NamedTuple):
    """A compiled kernel: `code` is machine code, or PTX (text that ends with a zero) which the driver compiles."""

    name: str
    code: bytes
    seconds: float  # that it took to compile; 0: it came from the cache


def unavailable_reason() -> str | None:
    """Why nothing can be compiled here, with the way out; `None`: it can."""
    if not (_INSTALLED.is_dir() or _CHECKOUT.is_dir()):
        return f"the kernels' sources are not in {_INSTALLED}: install the package anew"
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
    """The code of each kernel, from the cache or from NVRTC, side by side.

    Args:
        names: of kernels, as csrc/cuda/host/plan.cpp makes them.
        architecture: compute capability of the GPU, 90 for 9.0.
        cache: where compiled kernels are kept; `None`: nowhere.
        target: "cubin" or "ptx"; `None`: machine code, or PTX for a GPU that is newer than this NVRTC.
        line_info: keep the places in the sources, for profilers; the code is three times as large.
        each: called with every kernel that is ready.

    Raises:
        CompilerError: NVRTC cannot be loaded or refuses the source; the message has its log.
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
    """The kernels that losses of these head widths can need: every mask, gradient or not, any length."""
    chunks_t, chunks_s = (-(-width // 8) for width in (width_t, width_s))
    pieces_t, pieces_s = _PIECES[dtype_t], _PIECES[dtype_s]
    shape = f"{chunks_t}_{pieces_t}_{chunks_s}_{pieces_s}"
    fused = [f"fused_{pieces_s}_{chunks_t}_{pieces_t}_{chunks_s}_{causal}" for causal in (0, 1)]
    # Training in half precision may round as ex2.approx does; rows, evaluation and float32 may not.
    statistics = [f"statistics_{exact}_{shape}" for exact in ((1,) if pieces_s == 3 else (0, 1))]
    return [*fused, *statistics, *(f"visit_{pieces}_{shape}" for pieces in (0, pieces_s)), "reduce"]


@cache
def source(places: bool = False) -> str:
    """All device code as one text; with `places`, lines are said to be those of the files where they stand."""
    folder = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED
    return _inlined(folder, "kernels.cuh", set(), f"{folder}/" if places else "")


def _inlined(folder: Path, name: str, seen: set[str], prefix: str) -> str:
    lines = [f'#line 1 "{prefix}{name}"']
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        include = re.fullmatch(r'#include "([\w.]+)"', line)
        if include and (folder / include[1]).exists():
            if include[1] not in seen:
                seen.add(include[1])
                lines += [_inlined(folder, include[1], seen, prefix), f'#line {number + 1} "{prefix}{name}"']
            else:
                lines.append("")
        else:
            lines.append("" if line == "#pragma once" else line)
    return "\n".join(lines)


def _entry(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected a kernel as fused_1_2_1_1_0, got {name!r}")
    kind, *arguments = name.split("_")
    return f"MINILM_{kind.upper()}({', '.join([name, *arguments])})"


OPTIONS = ("-std=c++17", "-default-device")  # the latter for lambdas


def _digest(name: str, architecture: int, target: str, options: Sequence[str]) -> str:
    parts = (source(), _entry(name), *options, _version(), architecture, target)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _compile(name: str, architecture: int, target: str, options: Sequence[str]) -> bytes:
    text = f'{source("-lineinfo" in options)}\n#line 1 "{name}"\n{_entry(name)}\n'
    return compile_text(text, name, architecture, target, options)


def compile_text(text: str, name: str, architecture: int, target: str, options: Sequence[str]) -> bytes:
    """CUDA C++ as machine code ("cubin") or PTX ("ptx", ends with a zero). Raises `CompilerError` with NVRTC's log."""
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
                + log.strip("\0\n ")
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
        raise CompilerError(f"NVRTC hands out no result: {status.name}, {failed.name}")
    return content


@cache
def _nvrtc() -> Any:
    """NVIDIA's bindings of NVRTC, which they find and load."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # of the loader: no library, or one of another major version
        raise CompilerError(
            f"NVRTC, CUDA's compiler library, cannot be loaded ({error}); CUDA builds of PyTorch bring it along, "
            "otherwise: pip install cuda-bindings nvidia-cuda-nvrtc, of PyTorch's CUDA version"
        ) from error
    return nvrtc


@cache
def _version() -> str:
    _, major, minor = _nvrtc().nvrtcVersion()
    return f"{major}.{minor}"


def _target(architecture: int, target: str | None) -> tuple[int, str]:
    """What to compile for a GPU: its machine code, or PTX of the newest architecture that this NVRTC knows."""
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
