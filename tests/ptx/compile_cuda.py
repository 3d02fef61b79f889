"""Compiles csrc/cuda for the emulator: a library whose launches are emulated, and the PTX of its kernels.

nvcc compiles the kernels as they stand. Its host code, with the parameter structures and the launches, is linked with
the driver and the binding against native/cudart.cpp, a stand-in runtime. This is the only module that knows a compiler.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import torch

from .build import FOLDER, LIMIT, NATIVE, compiled, kept
from .parser import Module, parse

COMPILER = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")  # None: the CUDA family cannot be compiled
OPERATORS = "minilm_kernels_cuda_ptx"  # where the library registers its operators
_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
_ARCHITECTURE = 80  # its PTX is what newer GPUs translate as well
_RUN = "_ZN6minilm4cuda3runERKNS0_4CallERKNS0_6LimitsEPv"  # native/hooks.cpp


def compile_library(folder: Path = FOLDER) -> tuple[Path, list[Module]]:
    """The library, and the PTX of each of its `.cu` files."""
    if COMPILER is None:
        raise RuntimeError("nvcc was not found; install the CUDA toolkit, or put nvcc on the PATH")
    inputs = [*sorted(path for path in _SOURCES.iterdir() if path.is_file()), *sorted(NATIVE.iterdir()), Path(__file__)]
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True, timeout=LIMIT).stdout
    place = kept(folder, "cuda", [*inputs, version, torch.__version__], _make)
    units = sorted(_SOURCES.glob("*.cu"))
    return place / "library.so", [parse((place / f"{unit.stem}.ptx").read_text(encoding="utf-8")) for unit in units]


def _make(folder: Path) -> None:
    torch_folder, objects = Path(torch.__file__).parent, []
    code = f"-gencode=arch=compute_{_ARCHITECTURE},code=compute_{_ARCHITECTURE}"
    device = [
        "-std=c++17",
        "-O3",
        "-lineinfo",
        "-cudart=none",
        code,
        "-Xcompiler=-fPIC",
        "--keep",
        f"--keep-dir={folder}",
    ]
    for unit in sorted(_SOURCES.glob("*.cu")):
        objects.append(str(folder / f"{unit.stem}.o"))
        compiled([str(COMPILER), *device, "-c", str(unit), "-o", objects[-1]], unit.name)
    # MINILM_EMULATED means in binding.cpp that the operators are those of CPU tensors; tests/relation has its own ones.
    host = ["-std=c++17", "-O2", "-fPIC", "-DMINILM_EMULATED", f"-Dminilm_kernels_cuda_emulated={OPERATORS}"]
    host += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{_SOURCES}"]
    for include in (_toolkit_include(), torch_folder / "include"):
        host += ["-isystem", str(include)]
    for unit in (*sorted(_SOURCES.glob("*.cpp")), NATIVE / "cudart.cpp", NATIVE / "hooks.cpp"):
        objects.append(str(folder / f"{unit.stem}.o"))
        compiled(["g++", *host, "-c", str(unit), "-o", objects[-1]], unit.name)
    link = [f"-Wl,--wrap={_RUN}", "-Wl,-Bsymbolic", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    compiled(["g++", "-shared", *objects, *link, "-o", str(folder / "library.so")], "the library")


def _toolkit_include() -> Path:
    command = [str(COMPILER), "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT).stderr
    for flag in re.findall(r"\"?-I([^\"\s]+)", said):
        if (Path(flag) / "cuda_runtime.h").exists():
            return Path(flag).resolve()
    raise RuntimeError("nvcc does not say where cuda_runtime.h is")
