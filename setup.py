"""Packs the native libraries into the package. build_support/native.py builds them; pyproject.toml has the metadata.

Environment variables:
    MINILM_KERNELS_BUILD:
        auto (default): build each library if a compiler and torch are installed; otherwise leave it out and record the
            reason.
        none: build no library; the package is pure Python.
        native: build all libraries or fail. Torch becomes a build requirement if it is not installed.
    MAX_JOBS: the largest number of parallel compilers.
    CXX, CXXFLAGS, LDFLAGS: the C++ compiler and additional flags.

The libraries use PyTorch's stable ABI: one build works with every torch from 2.10 and every Python from 3.10, with and
without a GPU. The build needs no CUDA, because the CUDA library is host code and its kernels are package data.
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
    """Builds the libraries. If `auto` cannot build one, it writes the reason to a file, which the backend reports."""

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
        """Copies the libraries, or the reasons why they are missing, into the checkout of an editable installation."""
        for ext in self.extensions:
            library = Path(self.get_ext_filename(ext.name)).name
            for name in (library, f"{library.partition('.')[0]}.missing"):
                built, target = (Path(root, "minilm_kernels", name) for root in (self.build_lib, "."))
                target.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, target)


class BuildPackage(build_py):
    """Adds the sources of the CUDA kernels. An editable installation reads those of its checkout instead."""

    def run(self) -> None:
        super().run()
        sources = Path("csrc/cuda/device")
        if sources.is_dir() and not self.editable_mode:
            target = Path(self.build_lib, "minilm_kernels", "cuda_device")
            shutil.copytree(sources, target, dirs_exist_ok=True)
            host_only = shutil.ignore_patterns("binding.h")
            shutil.copytree("csrc/common", target / "common", dirs_exist_ok=True, ignore=host_only)


class TaggedWheel(bdist_wheel):
    """Tags a wheel without libraries as pure Python."""

    def get_tag(self) -> tuple[str, str, str]:
        build = self.distribution.get_command_obj("build_ext")
        if self.distribution.have_run.get("build_ext") and not any(Path(name).exists() for name in build.get_outputs()):
            self.root_is_pure = True
        return super().get_tag()


def _banner(text: str) -> str:
    """Makes a message stand out in the output of a build."""
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
