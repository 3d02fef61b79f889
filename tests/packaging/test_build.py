"""The build by itself: what it is asked for, what it finds, what it says when it cannot; and what comes out."""

from __future__ import annotations

import inspect
import re
import shutil
import stat
from pathlib import Path

import backend
import native
import pytest
from torch.utils import cpp_extension

from minilm_kernels import available_backends

from .binaries import gpu_code, libraries_named_by, stable_abi, symbols_from_elsewhere
from .environments import STEERING

VARIABLES = [*STEERING, "CUDA_HOME", "CUDA_PATH"]
AMPERE = ["compute_80,code=sm_80", "compute_86,code=[sm_86,compute_86]"]
NVCC_13 = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n", encoding="ascii")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def _torch(cuda: str | None = None) -> native.Torch:
    return native.find_torch()._replace(cuda=cuda)


class TestMode:
    @pytest.mark.parametrize(
        ("mode", "cuda", "expected"),
        [
            (None, None, ["cpu"]),
            ("auto", None, ["cpu"]),
            ("auto", "13.0", ["cpu", "cuda"]),
            ("none", "13.0", []),
            ("cpu", "13.0", ["cpu"]),
            ("cuda", None, ["cuda"]),
            ("cpu,cuda", None, ["cpu", "cuda"]),
        ],
    )
    def test_libraries(self, monkeypatch, tmp_path, mode, cuda, expected):
        (tmp_path / "cuda").mkdir()
        (tmp_path / "cuda/x.cu").touch()
        found = _torch(cuda)
        monkeypatch.setattr(native, "CSRC", tmp_path)
        monkeypatch.setattr(native, "find_torch", lambda: found)
        if mode is not None:
            monkeypatch.setenv("MINILM_KERNELS_BUILD", mode)
        assert native.wanted() == expected

    @pytest.mark.parametrize("mode", ["gpu", "", "CPU", "cpu,none"])
    def test_anything_else_is_named(self, monkeypatch, mode):
        monkeypatch.setenv("MINILM_KERNELS_BUILD", mode)
        with pytest.raises(native.BuildError, match=f"MINILM_KERNELS_BUILD: expected one of auto, .*got {mode!r}"):
            native.wanted()

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [(None, []), ("auto", []), ("none", []), ("cpu", ["torch>=2.11"]), ("cpu,cuda", ["torch>=2.11"])],
    )
    def test_torch_is_fetched_only_for_a_library_that_was_asked_for(self, monkeypatch, tmp_path, mode, expected):
        def missing():
            raise native.BuildError("no headers")

        if mode is not None:
            monkeypatch.setenv("MINILM_KERNELS_BUILD", mode)
        assert backend.get_requires_for_build_wheel() == []  # there is one
        monkeypatch.setattr(native, "find_torch", missing)
        assert backend.get_requires_for_build_wheel() == expected
        assert backend.get_requires_for_build_editable() == expected
        assert backend.get_requires_for_build_sdist() == []
        monkeypatch.setenv("CXX", str(tmp_path / "none"))  # without a compiler gigabytes of headers are of no use
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

    @pytest.mark.parametrize(("version", "cuda"), [("2.11.0+cu130", "13.0"), ("2.13.0+cpu", None)])
    def test_found(self, folder, version, cuda):
        self._pretend(folder, version, cuda)
        assert native.find_torch() == native.Torch(folder, version, cuda)

    def test_too_old(self, folder):
        self._pretend(folder, "2.9.1", None)
        with pytest.raises(native.BuildError, match=r"torch 2\.9\.1 in .* is too old, 2\.11 or later"):
            native.find_torch()

    def _pretend(self, folder: Path, version: str, cuda: str | None) -> None:
        header = folder / "include/torch/csrc/stable/library.h"
        header.parent.mkdir(parents=True)
        header.touch()
        text = f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
        (folder / "version.py").write_text(text, encoding="ascii")


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


class TestArchitectures:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("8.0", ["compute_80,code=sm_80"]),
            ("8.0;9.0+PTX", ["compute_80,code=sm_80", "compute_90,code=[sm_90,compute_90]"]),
            ("8.0 9.0+PTX", ["compute_80,code=sm_80", "compute_90,code=[sm_90,compute_90]"]),
            (" 9.0a;12.0; ", ["compute_90a,code=sm_90a", "compute_120,code=sm_120"]),
            ("9.0 9.0+PTX", ["compute_90,code=[sm_90,compute_90]"]),
            ("Hopper", ["compute_90,code=[sm_90,compute_90]"]),
            ("Ampere;Hopper", [*AMPERE, "compute_90,code=[sm_90,compute_90]"]),
            ("8.0 Ampere", AMPERE),
        ],
    )
    def test_list(self, text, expected):
        assert native.architectures(text, NVCC_13, "13.0") == [f"-gencode=arch={x}" for x in expected]

    @pytest.mark.parametrize("text", [None, ""])
    def test_default(self, text):
        def numbers(known):
            return [flag.rpartition("=")[2] for flag in native.architectures(text, known, "12.4")]

        assert numbers(NVCC_13) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "[sm_120,compute_120]"]
        # An older toolkit leaves out what it does not know; the PTX of its newest serves newer GPUs.
        assert numbers({x for x in NVCC_13 if x <= (9, 0)}) == ["sm_80", "sm_86", "sm_89", "[sm_90,compute_90]"]

    @pytest.mark.parametrize("word", ["Hoper", "hopper", "90", "9.0+ptx", "sm_90", "9.0,10.0", "9.0x"])
    def test_nonsense_is_named(self, word):
        with pytest.raises(native.BuildError, match=r"TORCH_CUDA_ARCH_LIST: expected numbers like.* got '") as caught:
            native.architectures(f"8.0;{word}", NVCC_13, "13.0")
        assert repr(word) in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "left_out", "expected"),
        [
            ("7.5 8.0 9.0+PTX", ["7.5"], ["sm_80", "[sm_90,compute_90]"]),
            ("5.2;6.0;7.0+PTX;8.0", ["5.2", "6.0", "7.0+PTX"], ["sm_80"]),
            ("Pascal;Turing;Ada", ["6.0", "6.1+PTX", "7.5+PTX"], ["[sm_89,compute_89]"]),
            ("Blackwell", ["10.3", "12.1+PTX"], ["sm_100", "sm_120"]),
        ],
    )
    def test_what_cannot_be_served_is_left_out_with_a_word(self, capsys, text, left_out, expected):
        flags = native.architectures(text, NVCC_13, "13.0")
        assert [flag.rpartition("=")[2] for flag in flags] == expected
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("minilm_kernels: TORCH_CUDA_ARCH_LIST: without ")
        assert re.findall(r"([\d.]+(?:\+PTX)?) \(", line) == left_out

    @pytest.mark.parametrize("text", ["7.5", "7.0;7.5+PTX", "Volta Turing"])
    def test_nothing_left(self, text):
        with pytest.raises(native.BuildError, match=r"nothing is left of .* \(the kernels need 8\.0 or later\)"):
            native.architectures(text, NVCC_13, "13.0")

    def test_names_are_those_of_torch(self):
        """torch keeps them inside a function: they are read from its source."""
        source = inspect.getsource(cpp_extension._get_cuda_arch_flags)
        found = dict(re.findall(r"\('([A-Z][A-Za-z+]*)', '([\d.;+PTX]+)'\)", source))
        assert found
        assert found.items() <= native.NAMED_ARCHITECTURES.items()

    def test_too_old_a_toolkit(self):
        with pytest.raises(native.BuildError, match=r"CUDA 12\.4 cannot compile for 10\.0 \(it can for 8\.0 to 9\.0\)"):
            native.architectures("9.0 10.0", {(8, 0), (9, 0)}, "12.4")

    def test_a_toolkit_that_knows_none(self):
        with pytest.raises(native.BuildError, match=r"CUDA 10\.2 can compile for none of 8\.0;"):
            native.architectures(None, {(7, 0)}, "10.2")


class TestToolkit:
    """What is wrong with a machine's CUDA is said before anything is compiled."""

    @pytest.fixture(autouse=True)
    def _sources(self, monkeypatch, tmp_path):
        (tmp_path / "csrc/cuda").mkdir(parents=True)
        (tmp_path / "csrc/cuda/x.cu").touch()
        monkeypatch.setattr(native, "CSRC", tmp_path / "csrc")

    def _plan(self, cuda: str | None = None) -> native.Plan:
        return native.PLANS["cuda"](_torch(cuda))

    def test_no_nvcc(self, monkeypatch):
        which = shutil.which
        monkeypatch.setattr(native.shutil, "which", lambda name: None if "nvcc" in name else which(name))
        with pytest.raises(native.BuildError, match=r"no nvcc was found .*set CUDA_HOME or NVCC"):
            self._plan()

    def test_no_nvcc_where_it_should_be(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(native.BuildError, match=f"CUDA_HOME is '{tmp_path}', which has no bin/nvcc"):
            self._plan()
        monkeypatch.setenv("NVCC", "nvcc-of-yesterday --quiet")
        with pytest.raises(native.BuildError, match="NVCC is 'nvcc-of-yesterday --quiet', which cannot be run"):
            self._plan()

    def test_another_major_version_than_that_of_torch(self, monkeypatch, tmp_path):
        monkeypatch.setenv("NVCC", _script(tmp_path / "nvcc", "echo Cuda compilation tools, release 12.4, V12.4.131"))
        with pytest.raises(native.BuildError, match=r"built with CUDA 13\.0, but .*nvcc is of CUDA 12\.4"):
            self._plan("13.0")

    def test_an_nvcc_that_fails(self, monkeypatch, tmp_path):
        monkeypatch.setenv("NVCC", _script(tmp_path / "nvcc", "echo no licence >&2; exit 1"))
        with pytest.raises(native.BuildError, match=r"nvcc --version failed: no licence"):
            self._plan()

    def test_no_sources(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "CSRC", tmp_path)
        with pytest.raises(native.BuildError, match="no CUDA sources in csrc/cuda"):
            self._plan()


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


_TINY = {
    "tiny.cu": "__global__ void tiny(float* x) { x[threadIdx.x] *= 2; }\n"
    "void run_tiny(float* x) { tiny<<<1, 32>>>(x); }\n",
    "binding.cpp": "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n"
    "void run_tiny(float* x);\n"
    "static void tiny(torch::stable::Tensor x) { run_tiny(static_cast<float*>(x.mutable_data_ptr())); }\n"
    'STABLE_TORCH_LIBRARY(minilm_tiny, m) { m.def("tiny(Tensor(a!) x) -> ()"); }\n'
    'STABLE_TORCH_LIBRARY_IMPL(minilm_tiny, CUDA, m) { m.impl("tiny", TORCH_BOX(&tiny)); }\n',
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_tiny_cuda_library(monkeypatch, tmp_path):
    source = tmp_path / "a folder" / "cuda"
    source.mkdir(parents=True)
    for name, text in _TINY.items():
        (source / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(native, "CSRC", source.parent)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-Werror all-warnings -Xcompiler -Werror")
    monkeypatch.setenv("CXXFLAGS", "-Werror")
    library = tmp_path / "out" / "_cuda.abi3.so"
    native.build("cuda", library, tmp_path / "some objects")
    assert gpu_code(library) == {"sm_80", "sm_90", "compute_90"}
    assert symbols_from_elsewhere(library) <= stable_abi()
    assert not {name for name in libraries_named_by(library) if "cuda" in name}


@pytest.mark.skipif(available_backends()["cpu"] is not None, reason="the package has no CPU library")
def test_symbols_of_the_cpu_library():
    """Any torch from 2.10 on has what the library needs, and no Python has to: a break of that fails here."""
    import minilm_kernels

    library = Path(minilm_kernels.__file__).with_name("_cpu.abi3.so")
    names = symbols_from_elsewhere(library)
    assert "aoti_torch_library_def" in names  # they are read
    assert names <= stable_abi()
    assert {name for name in libraries_named_by(library) if "torch" in name or "python" in name} == {"libtorch_cpu.so"}
