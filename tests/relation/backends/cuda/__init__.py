"""The kernels of csrc/cuda compiled for the host, with an emulated thread block, for tests without a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[3] / "csrc"
COMPILER = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
_FLAGS = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-ffp-contract=off", "-Wall", "-Werror"]
_FLAGS += ["-DMINILM_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE}", f"-I{SOURCES}"]


def build(folder: Path) -> None:
    """Compiles the emulated library."""
    import ninja

    torch_folder = Path(torch.__file__).parent
    host = (path for path in sorted(SOURCES.glob("cuda/host/*.cpp")) if path.name != "gpu.cpp")
    units = [*host, *sorted(HERE.glob("*.cpp"))]
    flags = " ".join([*_FLAGS, "-isystem", str(torch_folder / "include")])
    objects = [f"{unit.name}.o" for unit in units]
    lines = [
        f"rule compile\n  command = {COMPILER} {flags} -x c++ -c $in -o $out",
        f"rule link\n  command = {COMPILER} -shared $in -o $out -L{torch_folder / 'lib'} -ltorch_cpu",
        *(f"build {out}: compile {unit}" for out, unit in zip(objects, units, strict=True)),
        f"build emulated.so: link {' '.join(objects)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tool = Path(ninja.BIN_DIR) / "ninja"
    result = subprocess.run([tool, "-C", folder, "-j", "2"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-4000:]


def load(folder: Path) -> ctypes.CDLL:
    """Loads the library; its operators are `torch.ops.minilm_kernels_cuda_emulated`."""
    library = folder / "emulated.so"
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_set_props.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    loaded.emulated_set_seed.argtypes = (ctypes.c_uint64,)
    return loaded


def plan(library: ctypes.CDLL, kind: str, smem: tuple[int, int], planes: tuple[int, ...], last: int) -> list[int]:
    """Calls `plan_symmetric` (last: the longest sequence) or `plan_row_wise` (last: with gradient or not)."""
    out = (ctypes.c_int64 * 4)()
    last_type = ctypes.c_int64 if kind == "symmetric" else ctypes.c_int
    function = getattr(library, f"emulated_plan_{kind}")
    function.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_int), last_type, ctypes.c_void_p)
    function(*smem, (ctypes.c_int * 6)(*planes), last, out)
    return list(out)
