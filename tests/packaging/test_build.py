"""The build of the native libraries: its modes, requirements and errors, and the symbols of the libraries."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import backend
import native
import pytest

import minilm_kernels

from .binaries import libraries_named_by, stable_abi, symbols_from_elsewhere
from .environments import BUILD_VARIABLES


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in BUILD_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="ascii")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


class TestMode:
    @pytest.mark.parametrize(
        ("mode", "platform", "expected"),
        [
            (None, "linux", ["cpu", "cuda"]),
            ("auto", "linux", ["cpu", "cuda"]),
            ("auto", "darwin", ["cpu"]),
            ("native", "linux", ["cpu", "cuda"]),
            ("native", "darwin", ["cpu"]),
            ("none", "linux", []),
        ],
    )
    def test_libraries(self, monkeypatch, mode, platform, expected):
        """The host code of `cuda` needs no CUDA; it is built on every Linux."""
        monkeypatch.setattr(native.sys, "platform", platform)
        if mode is not None:
            monkeypatch.setenv("MINILM_KERNELS_BUILD", mode)
        assert native.wanted() == expected

    @pytest.mark.parametrize("mode", ["gpu", "", "cpu", "cuda", "NATIVE", "native,none"])
    def test_another_mode_is_an_error(self, monkeypatch, mode):
        monkeypatch.setenv("MINILM_KERNELS_BUILD", mode)
        with pytest.raises(
            native.BuildError, match=f"MINILM_KERNELS_BUILD: expected auto, none or native, got {mode!r}"
        ):
            native.wanted()

    @pytest.mark.parametrize(
        ("mode", "expected"), [(None, []), ("auto", []), ("none", []), ("native", ["torch>=2.11"])]
    )
    def test_torch_is_fetched_only_for_a_library_that_was_asked_for(self, monkeypatch, tmp_path, mode, expected):
        def missing():
            raise native.BuildError("no headers")

        if mode is not None:
            monkeypatch.setenv("MINILM_KERNELS_BUILD", mode)
        assert backend.get_requires_for_build_wheel() == []  # torch is installed here
        monkeypatch.setattr(native, "find_torch", missing)
        assert backend.get_requires_for_build_wheel() == expected
        assert backend.get_requires_for_build_editable() == expected
        assert backend.get_requires_for_build_sdist() == []
        monkeypatch.setenv("CXX", str(tmp_path / "none"))  # no compiler is found, so no headers are needed
        assert backend.get_requires_for_build_wheel() == []


class TestTorch:
    @pytest.fixture
    def folder(self, monkeypatch, tmp_path) -> Path:
        monkeypatch.setattr(native, "find_spec", lambda _: None)
        monkeypatch.setattr(native.sysconfig, "get_paths", lambda *_, **__: {"platlib": tmp_path, "purelib": tmp_path})
        return tmp_path / "torch"

    def test_missing(self, folder):
        with pytest.raises(native.BuildError, match=f"headers were not found in {folder}; install torch first"):
            native.find_torch()

    @pytest.mark.parametrize("version", ["2.11.0+cu130", "2.13.0+cpu"])
    def test_found(self, folder, version):
        self._pretend(folder, version)
        assert native.find_torch() == native.Torch(folder, version)

    def test_too_old(self, folder):
        self._pretend(folder, "2.9.1")
        with pytest.raises(native.BuildError, match=r"torch 2\.9\.1 in .* is too old, 2\.11 or later"):
            native.find_torch()

    def _pretend(self, folder: Path, version: str) -> None:
        header = folder / "include/torch/csrc/stable/library.h"
        header.parent.mkdir(parents=True)
        header.touch()
        (folder / "version.py").write_text(f"__version__ = {version!r}\n", encoding="ascii")


class TestJobs:
    def test_by_memory(self):
        assert native.jobs(2**60) == 1
        assert 1 <= native.jobs(1) <= 4096

    def test_by_request(self, monkeypatch):
        monkeypatch.setenv("MAX_JOBS", "7")
        assert native.jobs(2**60) == 7

    @pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
    def test_bad_request(self, monkeypatch, count):
        monkeypatch.setenv("MAX_JOBS", count)
        with pytest.raises(native.BuildError, match=f"MAX_JOBS: expected a whole number from 1 on, got '{count}'"):
            native.jobs(1)


def test_a_compiler_that_runs_out_of_memory(monkeypatch, tmp_path):
    killed = "echo 'fatal error: Killed signal terminated program cc1plus' >&2; exit 1"
    monkeypatch.setenv("CXX", _script(tmp_path / "c++", killed))
    with pytest.raises(native.BuildError, match=r"cc1plus(.|\n)*ran out of memory, . at a time: set MAX_JOBS=1"):
        native.build("cpu", tmp_path / "_cpu.so", tmp_path / "objects")


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", _script(tmp_path / "c++", "echo what is AVX-512 >&2; exit 1"))
    with pytest.raises(native.BuildError, match=r"the compiler failed:(.|\n)*what is AVX-512") as caught:
        native.build("cpu", tmp_path / "_cpu.so", tmp_path / "objects")
    assert "MAX_JOBS" not in str(caught.value)


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory) -> Path:
    """The CUDA library, built with warnings as errors."""
    if sys.platform != "linux":
        pytest.skip("the CUDA library is built on Linux only")
    folder = tmp_path_factory.mktemp("a folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O1 -Werror")
        native.build("cuda", folder / "_cuda.abi3.so", folder / "some objects")
    return folder / "_cuda.abi3.so"


def test_the_cuda_library_is_built_without_cuda(cuda_library):
    """The library uses the stable ABI only and links no library of CUDA."""
    names = symbols_from_elsewhere(cuda_library)
    assert "aoti_torch_library_def" in names
    assert names - {"dlopen", "dlsym", "dlerror"} <= stable_abi()
    known = ("libtorch_cpu.so", "libstdc++.so", "libm.so", "libgcc_s.so", "libc.so", "libdl.so", "ld-linux")
    assert [name for name in libraries_named_by(cuda_library) if not name.startswith(known)] == []
    objects = (cuda_library.parent / "some objects").glob("*.o")
    units = ("binding", "driver", "gpu", "launch_plan", "sequences")
    assert {file.name for file in objects} == {f"{unit}.cpp.o" for unit in units}
    sources = [*native.CSRC.glob("cuda/host/*"), *native.CSRC.glob("common/*")]
    includes = [line for file in sources for line in file.read_text("utf-8").splitlines()]
    assert not [line for line in includes if line.startswith("#include") and ("<cuda" in line or "nvrtc" in line)]


def test_the_cuda_library_loads_without_a_gpu(cuda_library, tmp_path):
    """The library loads with a CPU build of torch and without a driver. The first call opens the driver."""
    code = (
        f"import torch; torch.ops.load_library({str(cuda_library)!r})\n"
        "print(*sorted(x for x in torch._C._dispatch_get_all_op_names() if x.startswith('minilm_kernels_cuda::')))\n"
        "print(any('libcuda.so' in line for line in open('/proc/self/maps')))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
    names, driver_is_open = result.stdout.splitlines()
    assert {"minilm_kernels_cuda::load", "minilm_kernels_cuda::relation_kl"} <= set(names.split())
    assert driver_is_open == "False"


@pytest.mark.skipif(minilm_kernels.backend_status()["cpu"] != "ready", reason="the package has no CPU library")
def test_symbols_of_the_cpu_library():
    """The library uses the stable ABI of torch 2.10 only, and no symbol of Python."""
    library = Path(minilm_kernels.__file__).with_name("_cpu.abi3.so")
    names = symbols_from_elsewhere(library)
    assert "aoti_torch_library_def" in names  # the list is not empty
    assert names <= stable_abi()
    assert {name for name in libraries_named_by(library) if "torch" in name or "python" in name} == {"libtorch_cpu.so"}
