"""Packs the native libraries of csrc/ into the package; build_support/native.py builds them, the metadata is in
pyproject.toml.

MINILM_KERNELS_BUILD=auto (default): build what this machine can, otherwise install without it and remember why;
none: pure Python; cpu, cuda, or cpu,cuda: build exactly that, or fail. MAX_JOBS bounds parallel compilers;
CXX, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME and TORCH_CUDA_ARCH_LIST are obeyed. The libraries use PyTorch's stable ABI: one
build serves every torch from 2.10 and every Python from 3.10.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
            self.warn(f"installing without the {name.upper()} library, a slower backend will serve: {error}")

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the libraries, or why there are none."""
        for ext in self.extensions:
            library = Path(self.get_ext_filename(ext.name)).name
            for name in (library, f"{library.partition('.')[0]}.missing"):
                built, target = (Path(root, "minilm_kernels", name) for root in (self.build_lib, "."))
                target.unlink(missing_ok=True)
                if built.exists():
                    shutil.copy2(built, target)


def extensions() -> list[Extension]:
    try:
        names = native.wanted()
    except native.BuildError as error:
        raise SystemExit(f"minilm_kernels: {error}") from None
    return [
        Extension(
            f"minilm_kernels._{name}",
            sources=sorted(p.as_posix() for p in Path("csrc", name).glob("*")),
            py_limited_api=True,
        )
        for name in names
    ]


libraries = extensions()
setup(
    ext_modules=libraries,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if libraries else {},
)
