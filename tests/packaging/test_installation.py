"""Installs the package into new environments as users do. `make packaging` runs these tests with a package index."""

from __future__ import annotations

import json
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

import minilm_kernels

from .cuda_stand_ins import add_stand_ins
from .environments import SECONDS, Environment, checkout, clean_environ, interpreter

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(2 * SECONDS)]

# All environments take the version of torch that runs the tests. A newer one may come with gigabytes of GPU libraries.
TORCH = f"torch=={version('torch').partition('+')[0]}"

# Prints the folder from which the sources of the CUDA kernels are read. No compiler is needed.
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
    """An empty environment after `pip install FOLDER`, which brings torch too."""
    folder = tmp_path_factory.mktemp("newcomer")
    constraint = folder / "constraint.txt"
    constraint.write_text(TORCH + "\n", encoding="ascii")
    environment = Environment(folder / "venv")
    environment.pip("install", str(source), PIP_CONSTRAINT=str(constraint), PIP_BUILD_CONSTRAINT=str(constraint))
    return environment


@pytest.fixture
def environment(newcomer, tmp_path) -> Environment:
    """An environment with the base dependencies, but without this package and without build tools."""
    return Environment(tmp_path / "venv", shared=newcomer)


@pytest.fixture(scope="session")
def distributions(source, tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    environ = {key: value for key, value in os.environ.items() if key != "MINILM_KERNELS_BUILD"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_pip_install_into_an_empty_environment(newcomer):
    """If torch is installed only after the build, the library is left out. The reason says how to get it."""
    reason = newcomer.check(cpu=False)["status"]
    assert "PyTorch's headers were not found" in reason
    assert "install torch first" in reason
    assert "pip install --no-build-isolation" in reason


def test_beside_torch_nothing_but_triton_is_installed(source, newcomer, tmp_path):
    """If torch is installed, pip adds only this package, and triton if it is missing (CPU builds of torch)."""
    triton = ["triton"] if sys.platform == "linux" else []
    for without, expected in ((("triton",), triton), ((), [])):
        environment = Environment(tmp_path / f"without{len(without)}", shared=newcomer, without=without)
        report = tmp_path / "report.json"
        environment.pip("install", "--dry-run", "--report", str(report), str(source))
        found = {entry["metadata"]["name"]: entry for entry in json.loads(report.read_text("utf-8"))["install"]}
        found.pop("setuptools", None)  # a dependency of torch that `Environment` leaves out
        assert sorted(found) == ["minilm_kernels", *expected]
        assert found["minilm_kernels"]["metadata"]["version"] == minilm_kernels.__version__


_WITHOUT_EXTRAS = """
import sys, torch, minilm_kernels as mk
from minilm_kernels import MiniLMLoss, MiniLMv2Loss, QKV, QKVExtractor

torch.manual_seed(0)
teacher, student = ([torch.randn(2, 9, 24, requires_grad=grad) for _ in range(3)] for grad in (False, True))
for loss in (MiniLMLoss(3), MiniLMv2Loss(6)):
    loss(QKV(*teacher), QKV(*student)).backward()
assert sorted(mk.__all__) == dir(mk)
assert "transformers" not in sys.modules
assert mk.PRESETS
for name in ("student_config", "copied_student", "random_student"):
    try:
        getattr(mk, name)
    except ImportError as error:
        assert "minilm_kernels[hf]" in str(error), error
    else:
        raise AssertionError(f"{name} without transformers")
"""


def test_without_the_extras_the_losses_work_and_errors_name_the_extra(newcomer):
    newcomer.run(_WITHOUT_EXTRAS)
    program = str(newcomer.folder / "bin/minilm-distill")
    (newcomer.folder / "text.txt").write_text("A sentence.\n", encoding="ascii")
    options = ["--teacher", "bert", "--text", "text.txt", "--output-dir", "student", "--copy-layers", "1"]
    for arguments, status, expected in (
        (["--help"], 0, "usage: minilm-distill"),
        (options, 1, 'pip install "minilm_kernels[distill]"'),
    ):
        result = subprocess.run(
            [program, *arguments],
            cwd=newcomer.folder,
            env=clean_environ(),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert result.returncode == status, result.stdout + result.stderr
        assert expected in result.stdout + result.stderr


def test_pip_install_without_build_isolation(source, environment):
    result = environment.attempt_pip("install", "--no-deps", "--no-build-isolation", str(source))
    assert result.returncode != 0  # the user has to install the build tools first
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


def test_sdist(source, distributions, environment):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = [member.name.partition("/")[2] for member in archive if member.isfile()]
    tracked = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file()}
    made = {"PKG-INFO", "setup.cfg", *(name for name in files if name.startswith("minilm_kernels.egg-info/"))}
    assert set(files) - made <= tracked
    packed = ("minilm_kernels/", "csrc/", "build_support/")
    root = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    # None of the tests, because they need the whole repository.
    assert set(files) - made == {name for name in tracked if name.startswith(packed) or name in root}
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
    assert {"minilm_kernels/metadata.json", "minilm_kernels/py.typed"} <= set(names)
    folders = {name.partition("/")[0] for name in names}  # no tests, examples or benchmarks
    assert {name for name in folders if not name.endswith(".dist-info")} == {"minilm_kernels"}
    environment.pip("install", "--no-deps", "--no-index", str(wheel))
    environment.check()
    assert environment.run(_SOURCES).strip() == str(environment.site / "minilm_kernels/cuda_device")


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux wheels are Linux wheels")
def test_make_wheels(source, distributions, tmp_path):
    """The wheel needs nothing that a Linux machine lacks except torch, and computes a loss in an empty environment."""
    copy = shutil.copytree(source, tmp_path / "source")
    # This environment is used as it is: make must not install the copy into it.
    installed = Path(sys.prefix) / ".installed"
    command = [
        "make",
        "--no-print-directory",
        "wheels",
        f"VENV={sys.prefix}",
        f"PYTHON={sys.executable}",
        f"TORCH={TORCH}",
    ]
    result = subprocess.run(
        [*command, f"--old-file={installed}"],
        cwd=copy,
        env=clean_environ(),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["status"] == "ready"
    (wheel,) = distributions.glob("*.whl")
    (repaired,) = (copy / "dist").glob("*.whl")
    assert len(list((copy / "dist").glob("*.tar.gz"))) == 1
    assert "-cp310-abi3-manylinux_" in repaired.name
    assert repaired.stat().st_size < 10**6
    with zipfile.ZipFile(repaired) as archive, zipfile.ZipFile(wheel) as original:
        libraries = [name for name in archive.namelist() if ".so" in name]
        # No other library was packed into the wheel.
        assert sorted(libraries) == sorted(name for name in original.namelist() if ".so" in name)


_HUB_KERNEL = """
import kernels, torch
from pathlib import Path

mk = kernels.get_local_kernel(Path(FOLDER))
assert Path(mk.__file__).parent == Path(FOLDER)
assert mk.backend_status()["cpu"] == "ready"
student = torch.randn(2, 9, 4, 8, requires_grad=True)
mk.relation_kl(torch.randn(2, 9, 4, 8), None, student, None).backward()
import minilm_kernels
assert minilm_kernels is mk
"""


def test_the_package_is_a_kernel_in_the_format_of_the_hub(distributions, environment, tmp_path):
    """The Hugging Face package `kernels` loads the folder of an installed or unpacked wheel."""
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    environment.pip("install", "kernels")
    folder = tmp_path / "unpacked/minilm_kernels"
    environment.run(_HUB_KERNEL.replace("FOLDER", repr(str(folder))), HF_HUB_OFFLINE="1")


def test_editable(source, environment, tmp_path):
    copy = shutil.copytree(source, tmp_path / "venv" / "copy")
    environment.pip("install", "--no-deps", "--editable", str(copy))
    environment.check()
    assert environment.run(_SOURCES).strip() == str(copy / "csrc/cuda/device")
    assert not (copy / "minilm_kernels/cuda_device").exists()  # the sources are compiled from the checkout


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
    """A PATH with Python and no compiler."""
    return str(environment.folder / "bin")


def test_without_a_compiler_it_installs_and_says_once_what_is_missing(source, environment, path):
    environment.pip("install", "--no-deps", str(source), PATH=path)
    environment.check(cpu=False)
    result = environment.attempt(["-W", "always", "-c", _WITHOUT])
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: minilm_kernels") == 1  # torch warns too: numpy is not installed
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
    assert "UserWarning: minilm_kernels" not in environment.attempt(["-W", "always", "-c", _WITHOUT]).stderr


def test_a_bad_mode_is_named(source, environment):
    result = environment.attempt_pip("install", "--no-deps", str(source), MINILM_KERNELS_BUILD="gpu")
    assert result.returncode != 0
    assert "MINILM_KERNELS_BUILD: expected auto, none or native, got 'gpu'" in result.stdout + result.stderr
