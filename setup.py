"""Builds the native libraries of csrc/; the metadata is in pyproject.toml.

MINILM_KERNELS_BUILD=auto (default): build what this machine can, otherwise install without it and remember why;
none: pure Python; cpu, cuda: build exactly that, or fail. MAX_JOBS bounds parallel compilers; CXX, CXXFLAGS and LDFLAGS
are obeyed. The libraries use PyTorch's stable ABI: one build serves every torch from 2.10 and every Python from 3.10.
PyTorch's headers are read, PyTorch is not imported: under build isolation they are those of the environment that pip
installs into.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("MINILM_KERNELS_BUILD", "auto")
CPU = Path("csrc/cpu")
# Vector code is compiled per instruction set and chosen at run time; a wheel must run on every processor.
INSTRUCTION_SETS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mfma"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_portable.cpp": [],
}
# No contraction: a sum shall come out the same wherever the compiler meets it. GCC 12 warns about its own headers.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
FLAGS += ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10


class BuildError(Exception):
    """Why a native library cannot be built here."""


def torch_folder() -> Path:
    spec = find_spec("torch")
    folders = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    raise BuildError(
        f"PyTorch's headers were not found in {' or '.join(map(str, dict.fromkeys(folders)))}; install torch first, "
        "then this package, if need be with pip install --no-build-isolation"
    )


def compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError(f"no C++ compiler was found (tried {asked or 'c++, g++, clang++'}); install one, or set CXX")


def ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildError("ninja was not found; pip install ninja") from None
        return found
    return str(Path(BIN_DIR) / "ninja")


def jobs() -> int:
    """Half a gigabyte a compiler."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(os.cpu_count() or 1, memory // 2**29))


def build_cpu(output: Path, folder: Path) -> None:
    """Compiles csrc/cpu to the library `output`, with objects in `folder`."""
    if sys.platform == "win32":
        raise BuildError("the CPU library is built on Linux and macOS only")
    torch, cxx, tool = torch_folder(), compiler(), ninja()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = {name: flags for name, flags in INSTRUCTION_SETS.items() if x86 or not flags}
    units |= {"relation.cpp": [], "binding.cpp": [STABLE_ABI, "-isystem", str(torch / "include")]}

    def path(p: Path) -> str:
        return str(p.absolute()).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def words(flags: list[str], variable: str = "") -> str:
        return shlex.join([*flags, *shlex.split(os.environ.get(variable, ""))]).replace("$", "$$")

    objects = [path(folder / f"{name}.o") for name in units]
    lines = [
        f"rule compile\n  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared $in -o $out $flags",
        *(
            f"build {out}: compile {path(CPU / name)}\n  flags = {words([*FLAGS, *flags], 'CXXFLAGS')}"
            for out, (name, flags) in zip(objects, units.items(), strict=True)
        ),
        f"build {path(output)}: link {' '.join(objects)}\n"
        f"  flags = {words(['-L' + str(torch / 'lib'), '-ltorch_cpu'], 'LDFLAGS')}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = subprocess.run(
        [tool, "-C", str(folder), "-j", str(jobs())], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        raise BuildError(f"the C++ compiler failed:\n{result.stdout[-4000:]}")


class BuildNative(build_ext):
    """Builds each library with ninja; what `auto` cannot build leaves a file that says why, read at run time."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        missing = output.with_name("_cpu.missing")
        missing.unlink(missing_ok=True)
        try:
            build_cpu(output, Path(self.build_temp) / "cpu")
        except BuildError as error:
            if MODE != "auto":
                raise SystemExit(f"minilm_kernels: MINILM_KERNELS_BUILD={MODE}: {error}") from None
            output.unlink(missing_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(str(error), encoding="utf-8")
            self.warn(f"installing without the CPU library, the slower backend `torch` will serve: {error}")

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the library, or why there is none."""
        for ext in self.extensions:
            for name in (Path(self.get_ext_filename(ext.name)).name, "_cpu.missing"):
                built, target = (Path(root, "minilm_kernels", name) for root in (self.build_lib, "."))
                target.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, target)


def extensions() -> list[Extension]:
    if MODE not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"minilm_kernels: MINILM_KERNELS_BUILD: expected auto, none, cpu or cuda, got {MODE!r}")
    if MODE == "cuda":
        raise SystemExit("minilm_kernels: MINILM_KERNELS_BUILD=cuda: this version has no CUDA library")
    if MODE == "none":
        return []
    return [
        Extension(
            "minilm_kernels._cpu",
            sources=sorted(str(p) for p in CPU.glob("*.cpp")),
            depends=sorted(str(p) for p in (*CPU.glob("*.h"), *CPU.glob("*.inl"))),
            py_limited_api=True,
        )
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={} if MODE == "none" else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
