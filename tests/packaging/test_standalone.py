"""The CPU kernels without torch, built by other compilers and run on other processors, some of them emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import native
import pytest

SECONDS = 600  # limit of one compilation or one run
pytestmark = [pytest.mark.packaging, pytest.mark.timeout(3 * SECONDS)]
ARM = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


def _need(*tools: str) -> None:
    """Skips the test if a tool is missing; with CI=true the test fails instead."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"{', '.join(missing)} not found: see .ci/run")
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; on Debian: apt install clang g++-aarch64-linux-gnu qemu-user")


def _build(compiler: str, folder: Path, x86: bool = True) -> str:
    """Builds the program with the flags of the package and with warnings as errors; returns its path."""
    objects = []
    for source in [*sorted((native.CSRC / "cpu").glob("*.cpp")), Path(__file__).with_name("standalone.cpp")]:
        flags = native.INSTRUCTION_SETS.get(source.name, [])
        if source.name != "binding.cpp" and (x86 or not flags):
            objects.append(folder / f"{source.name}.o")
            command = [compiler, *native.CPU_FLAGS, *flags, "-Werror", "-I", str(native.CSRC / "cpu")]
            subprocess.run([*command, "-c", str(source), "-o", str(objects[-1])], check=True, timeout=SECONDS)
    program = folder / "standalone"
    subprocess.run([compiler, "-pthread", *map(str, objects), "-o", str(program)], check=True, timeout=SECONDS)
    return str(program)


def _run(*command: str) -> list[str]:
    """Runs the program; returns the instruction sets that it tested."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    *names, summary = result.stdout.splitlines()[-1].split(", ")
    assert summary == "0 failures"
    return names[:-1]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> str:
    return _build("c++", tmp_path_factory.mktemp("standalone"))


x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="needs an x86-64 processor")


@x86_64
def test_this_processor(program):
    assert _run(program)[-1] == "portable"


@x86_64
def test_clang(tmp_path):
    _need("clang++")
    assert _run(_build("clang++", tmp_path))[-1] == "portable"


@x86_64
@pytest.mark.parametrize(
    ("processor", "expected"), [("Nehalem", ["portable"]), ("Haswell", ["avx2", "avx2-paired", "portable"])]
)
def test_older_processors(program, processor, expected):
    """Each processor runs its instruction sets, and their code has no newer instruction."""
    _need("qemu-x86_64")
    assert _run("qemu-x86_64", "-cpu", processor, program, "131") == expected


def test_arm(tmp_path):
    _need("aarch64-linux-gnu-g++", ARM[0])
    assert _run(*ARM, _build("aarch64-linux-gnu-g++", tmp_path, x86=False)) == ["portable"]
