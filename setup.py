"""Packs the native libraries of csrc/ into the package; build_support/native.py builds them, the metadata is in
pyproject.toml.

MINILM_KERNELS_BUILD=auto (default): build what this machine can with the torch that is there, otherwise install without
it and remember why; none: pure Python; native: build the libraries, or fail (and fetch torch where there is none).
MAX_JOBS bounds parallel compilers; CXX, CXXFLAGS and LDFLAGS are obeyed. The libraries use PyTorch's stable ABI: one
build serves every torch from 2.10, every Python from 3.10, and machines with and without a GPU. No CUDA is needed: the
CUDA library is host code, and the sources of its kernels become package data.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "build_support"))
import native


class BuildNative(build_ext):
    """Builds each library; what `auto` cannot build leaves a file that says why, read at run time."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition("_")[2]
        output = Path(self.get_ext_fullpath(ext.name))
        missing = output.with_name(f"_{name}.missing")
        missing.unlink(missing_ok=True)
        try:
            native.build(name, output, Path(self.build_temp) / name)
        except native.BuildError as error:
            if native.must_succeed():
                raise SystemExit(f"minilm_kernels: the {name.upper()} library: {error}") from None
            output.unlink(missing_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(str(error), encoding="utf-8")
            self.warn(_banner(f"WITHOUT THE {name.upper()} LIBRARY: a slower backend will serve. {error}"))

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the libraries, or why there are none."""
        for ext in self.extensions:
            library = Path(self.get_ext_filename(ext.name)).name
            for name in (library, f"{library.partition('.')[0]}.missing"):
                built, target = (Path(root, "minilm_kernels", name) for root in (self.build_lib, "."))
                target.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, target)


class BuildPackage(build_py):
    """Adds the sources of the CUDA kernels, which are compiled at their first use. A checkout uses its own."""

    def run(self) -> None:
        super().run()
        sources = Path("csrc/cuda/device")
        if sources.is_dir() and not self.editable_mode:
            target = Path(self.build_lib, "minilm_kernels", "cuda_device")
            shutil.copytree(sources, target, dirs_exist_ok=True)
            host_only = shutil.ignore_patterns("binding.h")
            shutil.copytree("csrc/common", target / "common", dirs_exist_ok=True, ignore=host_only)


class TaggedWheel(bdist_wheel):
    """A wheel into which no library could be built serves every platform and Python, and is named so."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.distribution.get_command_obj("build_ext")
        if self.distribution.have_run.get("build_ext") and not any(Path(name).exists() for name in build.get_outputs()):
            self.root_is_pure = True
        return super().get_tag()


def _banner(text: str) -> str:
    """Not to be overlooked between the lines of a build."""
    stars = "*" * 100
    return f"\n{stars}\n{text}\n{stars}"


def extensions() -> list[Extension]:
    try:
        names = native.wanted()
    except native.BuildError as error:
        raise SystemExit(f"minilm_kernels: {error}") from None
    common = list(Path("csrc/common").iterdir())
    return [
        Extension(
            f"minilm_kernels._{name}",
            sources=sorted(p.as_posix() for p in [*common, *Path("csrc", name).rglob("*")] if p.is_file()),
            py_limited_api=True,
        )
        for name in names
    ]


libraries = extensions()
setup(
    ext_modules=libraries,
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage, "bdist_wheel": TaggedWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if libraries else {},
)
