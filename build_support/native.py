"""Builds the native libraries with ninja. setup.py calls this module, which does not use setuptools.

`python build_support/native.py cuda` builds a library in place, in a source tree that is not installed.

To add a library, write a function that returns its `Plan`, and add it to `PLANS`. The build reads PyTorch's headers and
does not import PyTorch. Errors that a user can fix are raised as `BuildError`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parents[1] / "csrc"
MODE_VARIABLE = "MINILM_KERNELS_BUILD"
OLDEST_TORCH = (2, 11)  # as in pyproject.toml
COMPILER_MEMORY = 2**29  # bytes per compiler process
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the ABI of torch 2.10

WARNINGS = ["-Wall", "-Wno-unknown-warning-option", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # in headers of GCC 12
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}", *WARNINGS]
CXX_FLAGS += [f"-ffile-prefix-map={CSRC.parent}/="]  # error messages name source files relative to the project
# Without contraction, a sum has the same result wherever the compiler inlines it.
CPU_FLAGS = [*CXX_FLAGS, "-ffp-contract=off"]
# A wheel must run on every processor: kernels are compiled once per instruction set, and one is chosen at run time.
INSTRUCTION_SETS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mfma"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_portable.cpp": [],
}


class BuildError(Exception):
    """A native library cannot be built. The message has the reason."""


class Torch(NamedTuple):
    folder: Path
    version: str


class Unit(NamedTuple):
    """A source file with its compiler flags."""

    source: Path
    flags: list[str]


class Plan(NamedTuple):
    """Sources and linker flags of a library."""

    units: list[Unit]
    link_flags: list[str]


# --- which libraries


def wanted() -> list[str]:
    """Names of the libraries to build, according to MINILM_KERNELS_BUILD."""
    mode = os.environ.get(MODE_VARIABLE, "auto")
    if mode not in ("auto", "none", "native"):
        raise BuildError(f"{MODE_VARIABLE}: expected auto, none or native, got {mode!r}")
    # The CUDA library is host code and needs no CUDA to build. It opens the driver library on Linux only.
    return [] if mode == "none" else ["cpu", "cuda"] if sys.platform == "linux" else ["cpu"]


def must_succeed() -> bool:
    return os.environ.get(MODE_VARIABLE, "auto") != "auto"


def requirements() -> list[str]:
    """Additional build requirements: torch, if MINILM_KERNELS_BUILD=native and torch is not installed.

    With `auto`, the build uses an installed torch and never downloads one.
    """
    if not must_succeed():
        return []
    try:
        names = wanted()
        if names:
            _cxx()
    except BuildError:
        return []  # the build will report the error
    try:
        find_torch()
    except BuildError:
        return ["torch>=2.11"] if names else []
    return []


# --- torch, compiler and ninja


def find_torch() -> Torch:
    spec = find_spec("torch")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    # Under build isolation, also search the target environment and its base environment.
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    user = sysconfig.get_preferred_scheme("user")
    for places in (sysconfig.get_paths(), sysconfig.get_paths(user), sysconfig.get_paths(vars=base)):
        folders += [Path(places[kind], "torch") for kind in ("platlib", "purelib")]
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            text = (folder / "version.py").read_text(encoding="utf-8")
            version = re.search(r"__version__ = '([^']*)'", text)
            found = Torch(folder, version[1] if version else "unknown")
            number = re.match(r"(\d+)\.(\d+)", found.version)
            if number and (int(number[1]), int(number[2])) < OLDEST_TORCH:
                raise BuildError(f"torch {found.version} in {folder} is too old, 2.11 or later is needed")
            return found
    raise BuildError(
        f"PyTorch's headers were not found in {', '.join(map(str, folders))}; install torch first, then "
        '"setuptools>=77" and ninja, then this package with pip install --no-build-isolation (or build a wheel with '
        f"python -m build --no-isolation). With {MODE_VARIABLE}=native, the build downloads torch itself"
    )


def _cxx() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C++ compiler was found (tried {asked or 'c++, g++, clang++'}); install one, or set CXX")


def _ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja was not found; pip install ninja") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def jobs(memory_each: int) -> int:
    """Number of parallel compilers: MAX_JOBS, or as many as the processors and the memory (limit) allow."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS: expected a whole number from 1 on, got {asked!r}")
        return int(asked)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is no container, or it has no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, memory // memory_each))


# --- the libraries


def _cpu(torch: Torch) -> Plan:
    """csrc/cpu: the kernels, once per instruction set, the driver and the binding."""
    if sys.platform == "win32":
        raise BuildError("the CPU library is built on Linux and macOS only")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = [
        Unit(CSRC / "cpu" / name, [*CPU_FLAGS, *more]) for name, more in INSTRUCTION_SETS.items() if x86 or not more
    ]
    units += [
        Unit(CSRC / "cpu/driver.cpp", CPU_FLAGS),
        Unit(CSRC / "cpu/binding.cpp", [*CPU_FLAGS, *_torch_flags(torch)]),
    ]
    return Plan(units, _link_torch(torch))


def _cuda(torch: Torch) -> Plan:
    """csrc/cuda/host: host code only. The kernels are compiled at run time."""
    units = [
        Unit(source, [*CXX_FLAGS, *(_torch_flags(torch) if source.name == "binding.cpp" else [])])
        for source in sorted((CSRC / "cuda/host").glob("*.cpp"))
    ]
    return Plan(units, [*_link_torch(torch), "-ldl"])


PLANS: dict[str, Callable[[Torch], Plan]] = {"cpu": _cpu, "cuda": _cuda}


def _torch_flags(torch: Torch) -> list[str]:
    return [STABLE_ABI, "-isystem", str(torch.folder / "include")]


def _link_torch(torch: Torch) -> list[str]:
    return ["-L" + str(torch.folder / "lib"), "-ltorch_cpu"]


# --- the build


def build(name: str, output: Path, folder: Path) -> None:
    """Builds the library `name` as `output`, with objects in `folder`."""
    torch = find_torch()
    plan = PLANS[name](torch)
    tool, count = _ninja(), jobs(COMPILER_MEMORY)
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja_file(plan, output, folder), encoding="utf-8")
    result = subprocess.run(
        [tool, "-C", str(folder), "-j", str(count)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        killed = re.search(r"\b[Kk]illed\b|out of memory|bad_alloc", result.stdout)
        advice = f"\nThe compiler ran out of memory, {count} at a time: set MAX_JOBS=1" if killed else ""
        raise BuildError(f"the compiler failed:\n{result.stdout[-4000:]}{advice}")


def _ninja_file(plan: Plan, output: Path, folder: Path) -> str:
    def path(p: Path) -> str:
        return str(p.absolute()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def words(flags: list[str], variable: str = "") -> str:
        return shlex.join([*flags, *shlex.split(os.environ.get(variable, ""))]).replace("$", "$$")

    cxx = _cxx()
    lines = [  # -MD also tracks system headers, so that a new torch causes a new build
        f"rule cxx\n  command = {cxx} $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared $in -o $out $flags",
    ]
    objects = []
    for unit in plan.units:
        objects.append(path(folder / f"{unit.source.name}.o"))
        lines.append(f"build {objects[-1]}: cxx {path(unit.source)}\n  flags = {words(unit.flags, 'CXXFLAGS')}")
    flags = words(plan.link_flags, "LDFLAGS")
    lines.append(f"build {path(output)}: link {' '.join(objects)}\n  flags = {flags}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for library in sys.argv[1:]:
        try:
            build(library, CSRC.parent / f"minilm_kernels/_{library}.abi3.so", CSRC.parent / "build/native" / library)
        except BuildError as failure:
            sys.exit(f"the {library} library was not built: {failure}")
