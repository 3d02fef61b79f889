"""Fixtures of all tests: the backends and devices of this machine, reproducible random numbers, shared folders."""

import faulthandler
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

# The tests run many small operations, which more threads would slow down. This also holds for child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from filelock import FileLock

from minilm_kernels import backend_status

# The tests send these signals. A process in the background or under nohup ignores them, and so do its children.
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

# Backends to test; by default all that are usable. Triton's interpreter is tested in a process with this variable.
_ONLY = os.environ.get("MINILM_KERNELS_TEST_BACKENDS")
USABLE = [
    name
    for name, reason in backend_status().items()
    if reason == "ready" and name in (_ONLY or "cuda,triton,cpu,torch").split(",")
]
if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import patch_once

    patch_once()
# Hypothesis draws the same examples in every run; `--hypothesis-profile random` draws others.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def _serves(backend: str, device: str) -> bool:
    gpu = {"cuda": True, "triton": os.environ.get("TRITON_INTERPRET") != "1", "cpu": False}
    return backend not in gpu or gpu[backend] == (device == "cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Disables faulthandler's limit for tests with a `timeout` mark, which may take longer than that limit."""
    if item.get_closest_marker("timeout"):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=USABLE)
def backend(request) -> str:
    if "device" not in request.fixturenames and not _serves(request.param, "cpu"):
        pytest.skip("the test is on the CPU")
    return request.param


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    if "backend" in request.fixturenames and not _serves(request.getfixturevalue("backend"), request.param):
        pytest.skip("the backend is not for this device")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, fill)` returns a folder that `fill` fills once for all processes of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker has a folder inside the common one

    def made(name: str, fill: Callable[[Path], None]) -> Path:
        folder, unfinished = base / name, base / f"{name}.unfinished"
        with FileLock(base / f"{name}.lock", timeout=600):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                unfinished.rename(folder)
        return folder

    return made
