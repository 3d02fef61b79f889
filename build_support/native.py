"""What the native libraries are made of, and their build with ninja. Knows nothing of setuptools; see setup.py.

Adding a library is a function that returns its `Plan` and a row of `PLANS`. PyTorch's headers are read, PyTorch is not
imported. All errors that a user can mend are `BuildError`s.
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
ARCHITECTURES_VARIABLE = "TORCH_CUDA_ARCH_LIST"
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
OLDEST_ARCHITECTURE = (8, 0)  # matrix products of bfloat16
# torch's names in that variable (torch.utils.cpp_extension).
NAMED_ARCHITECTURES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
OLDEST_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # that torch

WARNINGS = ["-Wall", "-Wno-unknown-warning-option", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # GCC 12, own headers
# Messages name a source file by its place in the project, not by where it was built.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-ffile-prefix-map={CSRC.parent}/=", *WARNINGS]
# No contraction: a sum shall come out the same wherever the compiler meets it.
CPU_FLAGS = [*CXX_FLAGS, "-ffp-contract=off"]
# Vector code is compiled per instruction set and chosen at run time; a wheel must run on every processor.
INSTRUCTION_SETS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mfma"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_portable.cpp": [],
}


class BuildError(Exception):
    """Why a native library cannot be built here."""


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # the CUDA that it was built with


class Unit(NamedTuple):
    """A source that becomes an object file."""

    source: Path
    command: str  # "cxx" or "nvcc"
    flags: list[str]


class Plan(NamedTuple):
    """All that it takes to build a library."""

    units: list[Unit]
    linker: str  # "cxx" or "nvcc"
    link_flags: list[str]
    commands: dict[str, str]  # of the names above
    memory: int  # bytes that a compiler needs


# --- which libraries


def wanted() -> list[str]:
    """The libraries to build, by MINILM_KERNELS_BUILD."""
    mode = os.environ.get(MODE_VARIABLE, "auto")
    if mode == "auto":
        return ["cpu", "cuda"] if _cuda_at_hand() else ["cpu"]
    if mode == "none":
        return []
    names = mode.split(",")
    if not set(names) <= set(PLANS):
        choices = ", ".join(["auto", "none", *PLANS])
        raise BuildError(f"{MODE_VARIABLE}: expected one of {choices}, or several libraries as cpu,cuda; got {mode!r}")
    return names


def must_succeed() -> bool:
    return os.environ.get(MODE_VARIABLE, "auto") != "auto"


def requirements() -> list[str]:
    """Build requirements beside those of pyproject.toml: torch, where a library was asked for and torch is not there.

    `auto` builds with the torch that is there, and never fetches the gigabytes of another.
    """
    if not must_succeed():
        return []
    try:
        names = wanted()
        if names:
            _cxx()
    except BuildError:
        return []  # said by the build itself
    try:
        find_torch()
    except BuildError:
        return ["torch>=2.11"] if names else []
    return []


def _cuda_at_hand() -> bool:
    """Whether `auto` tries the CUDA library: a torch with CUDA, and sources."""
    try:
        return find_torch().cuda is not None and any((CSRC / "cuda").glob("*.cu"))
    except BuildError:
        return False


# --- what is on this machine


def find_torch() -> Torch:
    spec = find_spec("torch")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    # Under build isolation: the environment that is installed into, and those that it sees.
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    user = sysconfig.get_preferred_scheme("user")
    for places in (sysconfig.get_paths(), sysconfig.get_paths(user), sysconfig.get_paths(vars=base)):
        folders += [Path(places[kind], "torch") for kind in ("platlib", "purelib")]
    folders = list(dict.fromkeys(folders))
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            text = (folder / "version.py").read_text(encoding="utf-8")
            version = re.search(r"__version__ = '([^']*)'", text)
            cuda = re.search(r"^cuda\b.*= '([^']*)'", text, re.MULTILINE)
            found = Torch(folder, version[1] if version else "unknown", cuda[1] if cuda else None)
            number = re.match(r"(\d+)\.(\d+)", found.version)
            if number and (int(number[1]), int(number[2])) < OLDEST_TORCH:
                raise BuildError(f"torch {found.version} in {folder} is too old, 2.11 or later is needed")
            return found
    raise BuildError(
        f"PyTorch's headers were not found in {', '.join(map(str, folders))}; install torch first, and beside it "
        '"setuptools>=77" and ninja, then this package with pip install --no-build-isolation (a wheel with python -m '
        f"build --no-isolation); with {MODE_VARIABLE}=cpu the build fetches a torch of its own"
    )


def _cxx() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C++ compiler was found (tried {asked or 'c++, g++, clang++'}); install one, or set CXX")


def _nvcc() -> str:
    """A command; NVCC, or a CUDA toolkit's."""
    asked = os.environ.get("NVCC")
    if asked:
        if shutil.which(shlex.split(asked)[0]) is None:
            raise BuildError(f"NVCC is {asked!r}, which cannot be run")
        return asked
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which(str(Path(home, "bin", "nvcc")))
        if found is None:
            raise BuildError(f"CUDA_HOME is {home!r}, which has no bin/nvcc")
    else:
        found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if found is None:
            raise BuildError(
                "no nvcc was found (tried PATH and /usr/local/cuda); install the CUDA toolkit, or set CUDA_HOME or NVCC"
            )
    return shlex.quote(found)


def _output(command: str, *arguments: str) -> str:
    try:
        result = subprocess.run([*shlex.split(command), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{command} {' '.join(arguments)} failed: {getattr(error, 'stderr', '') or error}") from None
    return result.stdout


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
    """Compilers that run at the same time: MAX_JOBS, or what processors and memory allow, a container's included."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise BuildError(f"MAX_JOBS: expected a whole number from 1 on, got {asked!r}")
        return int(asked)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # not in a container, or without a limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, memory // memory_each))


# --- the libraries


def _cpu(torch: Torch) -> Plan:
    """csrc/cpu: kernels once per instruction set, a driver, and the binding."""
    if sys.platform == "win32":
        raise BuildError("the CPU library is built on Linux and macOS only")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = [
        Unit(CSRC / "cpu" / name, "cxx", [*CPU_FLAGS, *more])
        for name, more in INSTRUCTION_SETS.items()
        if x86 or not more
    ]
    units += [
        Unit(CSRC / "cpu/relation.cpp", "cxx", CPU_FLAGS),
        Unit(CSRC / "cpu/binding.cpp", "cxx", [*CPU_FLAGS, *_torch_flags(torch)]),
    ]
    return Plan(units, "cxx", _link_torch(torch), {"cxx": _cxx()}, memory=2**29)


def _cuda(torch: Torch) -> Plan:
    """csrc/cuda: device code by nvcc (*.cu), host code and the binding by the C++ compiler (*.cpp).

    Of torch it needs libtorch_cpu.so alone, and the CUDA runtime is linked statically: it is built beside any torch.
    """
    if sys.platform != "linux":
        raise BuildError("the CUDA library is built on Linux only")
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if not sources:
        raise BuildError("this version has no CUDA sources in csrc/cuda")
    nvcc, cxx = _nvcc(), _cxx()
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if release is None:
        raise BuildError(f"{nvcc} --version names no release")
    if torch.cuda and torch.cuda.split(".")[0] != release[1]:
        raise BuildError(
            f"torch {torch.version} was built with CUDA {torch.cuda}, but {nvcc} is of CUDA {release[1]}.{release[2]}: "
            "the major versions must agree; set CUDA_HOME to the other toolkit, or install the other torch"
        )
    known = {
        (int(number[:-1]), int(number[-1])) for number in re.findall(r"sm_(\d+)", _output(nvcc, "--list-gpu-code"))
    }
    host = ["-ccbin", cxx] if os.environ.get("CXX") and len(shlex.split(cxx)) == 1 else []
    flags = ["-std=c++17", "-O3", "-lineinfo", *host]
    flags += [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", *WARNINGS)]
    flags += architectures(os.environ.get(ARCHITECTURES_VARIABLE), known, f"{release[1]}.{release[2]}")
    memory = 2**31
    flags.append(f"--threads={max(1, jobs(memory) // len(sources))}")  # architectures beside each other
    units = [Unit(source, "nvcc", flags) for source in sources]
    cxx_flags = [*CXX_FLAGS, "-isystem", str(_cuda_include(nvcc))]
    for source in sorted((CSRC / "cuda").glob("*.cpp")):
        binding = source.name == "binding.cpp"
        units.append(Unit(source, "cxx", [*cxx_flags, *_torch_flags(torch)] if binding else cxx_flags))
    link = [*_link_torch(torch), "-cudart=static", "-Xlinker=--exclude-libs,ALL", *host]
    return Plan(units, "nvcc", link, {"nvcc": nvcc, "cxx": cxx}, memory)


PLANS: dict[str, Callable[[Torch], Plan]] = {"cpu": _cpu, "cuda": _cuda}


def _torch_flags(torch: Torch) -> list[str]:
    return [STABLE_ABI, "-isystem", str(torch.folder / "include")]


def _link_torch(torch: Torch) -> list[str]:
    return ["-L" + str(torch.folder / "lib"), "-ltorch_cpu"]


def _cuda_include(nvcc: str) -> Path:
    """Where nvcc finds cuda_runtime.h: what it would hand to the host compiler."""
    text = subprocess.run(
        [*shlex.split(nvcc), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    for line in text.splitlines():
        for flag in shlex.split(line.partition("INCLUDES=")[2]):
            folder = Path(flag.removeprefix("-I"))
            if (folder / "cuda_runtime.h").exists():
                return folder.resolve()
    raise BuildError(
        f"{nvcc} does not say where cuda_runtime.h is; is the CUDA runtime's development package installed?"
    )


def architectures(text: str | None, known: set[tuple[int, int]], release: str) -> list[str]:
    """nvcc's flags for a list like "8.0;9.0+PTX" or "Ampere;Hopper" (semicolons or spaces), read as torch reads it.

    What the kernels are too new for is left out with a word, as is what this nvcc does not know of a name's several.
    Without a list: the default one, less what this nvcc is too old (or too new) for, with PTX of the newest.
    """

    def dotted(version: tuple[int, int]) -> str:
        return f"{version[0]}.{version[1]}"

    chosen: dict[str, bool] = {}  # architecture -> whether its PTX is wanted
    left_out: list[str] = []
    for given in re.split(r"[;\s]+", (text or DEFAULT_ARCHITECTURES).strip("; ")):
        for word in NAMED_ARCHITECTURES.get(given, given).split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
            if match is None:
                names = ", ".join(NAMED_ARCHITECTURES)
                raise BuildError(
                    f"{ARCHITECTURES_VARIABLE}: expected numbers like '8.0;9.0+PTX' or names ({names}), "
                    f"got {word!r} in {text!r}"
                )
            version = (int(match[1]), int(match[2]))
            if version < OLDEST_ARCHITECTURE:
                left_out.append(f"{word} (the kernels need {dotted(OLDEST_ARCHITECTURE)} or later)")
                continue
            if version not in known:
                if text and given == word:
                    range_ = f"{dotted(min(known))} to {dotted(max(known))}" if known else "none"
                    raise BuildError(
                        f"{ARCHITECTURES_VARIABLE}: CUDA {release} cannot compile for {dotted(version)} "
                        f"(it can for {range_}); install another CUDA toolkit, or leave that architecture out"
                    )
                left_out.append(f"{word} (CUDA {release} cannot compile for it)")
                continue
            name = f"{match[1]}{match[2]}{match[3]}"
            chosen[name] = chosen.get(name, False) or bool(match[4])
    if not chosen and text:
        raise BuildError(f"{ARCHITECTURES_VARIABLE}: nothing is left of {text!r} without {', '.join(left_out)}")
    if not chosen:
        raise BuildError(
            f"CUDA {release} can compile for none of {DEFAULT_ARCHITECTURES}; install another CUDA toolkit"
        )
    if text and left_out:
        print(f"minilm_kernels: {ARCHITECTURES_VARIABLE}: without {', '.join(left_out)}", file=sys.stderr)
    if not text:
        chosen[list(chosen)[-1]] = True
    flags = []
    for name, ptx in chosen.items():
        code = f"sm_{name}" if not ptx else f"[sm_{name},compute_{name}]"
        flags.append(f"-gencode=arch=compute_{name},code={code}")
    return flags


# --- the build


def build(name: str, output: Path, folder: Path) -> None:
    """Builds the library `name` as `output`, with objects in `folder`."""
    torch = find_torch()
    plan = PLANS[name](torch)
    tool, count = _ninja(), jobs(plan.memory)
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

    lines = []
    for name, command in plan.commands.items():
        # The compiler's own headers in deps (-MD) too: a new torch or toolkit is a new build.
        lines.append(
            f"rule {name}\n  command = {command} $flags -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        )
    lines.append(f"rule link\n  command = {plan.commands[plan.linker]} -shared $in -o $out $flags")
    objects = []
    for unit in plan.units:
        objects.append(path(folder / f"{unit.source.name}.o"))
        flags = words(unit.flags, "CXXFLAGS" if unit.command == "cxx" else "")
        lines.append(f"build {objects[-1]}: {unit.command} {path(unit.source)}\n  flags = {flags}")
    flags = words(plan.link_flags, "LDFLAGS" if plan.linker == "cxx" else "")
    lines.append(f"build {path(output)}: link {' '.join(objects)}\n  flags = {flags}")
    return "\n".join(lines) + "\n"
