"""Fixtures of the whole suite: the backends and devices that can be tested here, and reproducible random numbers."""

import os

# The tests are very many small operations, also in processes that they start: more threads only make them wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from minilm_kernels import available_backends

# Names of the backends to test, for a run of the suite in Triton's interpreter; otherwise all that are usable.
_ONLY = os.environ.get("MINILM_KERNELS_TEST_BACKENDS")
USABLE = [
    name
    for name, reason in available_backends().items()
    if reason is None and name in (_ONLY or "cuda,triton,cpu,torch").split(",")
]
if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import patch_once

    patch_once()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def _serves(backend: str, device: str) -> bool:
    gpu = {"cuda": True, "triton": os.environ.get("TRITON_INTERPRET") != "1", "cpu": False}
    return backend not in gpu or gpu[backend] == (device == "cuda")


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
