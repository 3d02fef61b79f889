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
_FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{HERE}", f"-I{SOURCES}"]


_KERNELS = ("row_wise.cpp", "segments.cpp", "symmetric.cpp")


def build(folder: Path, races: bool = False, capability: int = 90) -> None:
    """Compiles the emulated library. With `races`, its kernels report every access to the race check (races.cpp)."""
    import ninja

    torch_folder = Path(torch.__file__).parent
    host = (path for path in sorted(SOURCES.glob("cuda/host/*.cpp")) if path.name != "gpu.cpp")
    units = [*host, *sorted(HERE.glob("*.cpp"))]
    defined = [f"-DMINILM_LIBRARY={_operators(races, capability)}", f"-DMINILM_EMULATED={capability}"]
    flags = " ".join([*_FLAGS, *defined, "-isystem", str(torch_folder / "include")])
    objects = [f"{unit.name}.o" for unit in units]
    lines = [
        f"rule compile\n  command = {COMPILER} {flags} $seen -x c++ -c $in -o $out",
        f"rule link\n  command = {COMPILER} -shared $in -o $out -L{torch_folder / 'lib'} -ltorch_cpu",
        *(
            f"build {out}: compile {unit}" + ("\n  seen = -fsanitize=thread" if races and unit.name in _KERNELS else "")
            for out, unit in zip(objects, units, strict=True)
        ),
        f"build emulated.so: link {' '.join(objects)}",
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tool = Path(ninja.BIN_DIR) / "ninja"
    result = subprocess.run([tool, "-C", folder, "-j", "2"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:]


def _operators(races: bool, capability: int) -> str:
    return f"minilm_kernels_cuda_{'races' if races else 'emulated'}" + (f"_{capability}" if capability != 90 else "")


def load(folder: Path, races: bool = False, capability: int = 90) -> ctypes.CDLL:
    """Loads the library, whose operators are `loaded.operators`."""
    library = folder / "emulated.so"
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_set_props.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int)
    loaded.emulated_set_seed.argtypes = (ctypes.c_uint64,)
    loaded.emulated_plan_parts.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    loaded.emulated_take_races.argtypes = (ctypes.c_char_p, ctypes.c_int64)
    loaded.emulated_ignore_barrier.argtypes = (ctypes.c_char_p, ctypes.c_int)
    loaded.operators = getattr(torch.ops, _operators(races, capability))
    return loaded


def take_races(library: ctypes.CDLL) -> list[str]:
    """The first race since the last call and the number of all; empty if there was none."""
    text = ctypes.create_string_buffer(400)
    count = library.emulated_take_races(text, len(text))
    return [f"{text.value.decode()}; {count} in all"] if count else []


def plan(library: ctypes.CDLL, kind: str, smem: tuple[int, int], planes: tuple[int, ...], last: int) -> list[int]:
    """Calls `plan_symmetric` (last: the longest sequence), `plan_segments` or `plan_row_wise` (last: with gradient)."""
    out = (ctypes.c_int64 * 4)()
    last_type = ctypes.c_int if kind == "row_wise" else ctypes.c_int64
    function = getattr(library, f"emulated_plan_{kind}")
    function.argtypes = (ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_int), last_type, ctypes.c_void_p)
    function(*smem, (ctypes.c_int * 6)(*planes), last, out)
    return list(out)
