"""The CUDA backend on CPU tensors, launching through the stand-in for the driver library of tests/ptx."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from minilm_kernels.relation import dispatch
from minilm_kernels.relation.backends import native_cuda

_numbers = itertools.count(10)


class GPU:
    """One that no test has used yet; `calls` are the driver's calls: name and three arguments."""

    def __init__(self, capability: int = 90, block_shared: int = 232448, processor_shared: int = 233472) -> None:
        from tests.ptx.driver import driver

        self.number = next(_numbers)
        self.stream = 0
        self.driver = driver()
        self.driver.set_gpu(self.number, capability, block_shared, processor_shared)
        self.calls: list[tuple[str, int, int, int]] = []
        self.failing = ""  # a call of the driver that fails

    @property
    def context(self) -> int:
        return 1000 + self.number

    def of(self, name: str) -> list[tuple[int, int, int]]:
        """What each call of a function was given."""
        return [call[1:] for call in self.calls if call[0] == name]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        def record(name: str, *given: int) -> int:
            self.calls.append((name, *given))
            return 1 if name == self.failing else 0

        with self.driver.recorded(record):
            yield


@pytest.fixture
def new_gpu(monkeypatch):
    """Makes GPUs, each of which serves `backend="cuda"` from then on; kernels do nothing there."""
    if sys.platform != "linux":
        pytest.skip("the CUDA library is for Linux")
    if torch.cuda.is_available():
        pytest.skip("beside a real driver library its stand-in is not the one that is found")
    assert native_cuda._LIBRARY.exists(), "build the library: MINILM_KERNELS_BUILD=native setup.py build_ext --inplace"

    def make(*limits: int) -> GPU:
        gpu = GPU(*limits)
        torch.ops.load_library(native_cuda._LIBRARY)
        monkeypatch.setattr(native_cuda, "_place", lambda _device: (gpu.number, gpu.stream))
        return gpu

    monkeypatch.setattr(native_cuda, "_missing", lambda: None)
    monkeypatch.setattr(native_cuda, "_broken", None)
    monkeypatch.setattr(native_cuda, "_loaded", set())
    monkeypatch.setattr(native_cuda, "_DEVICE", "cpu")
    dispatch.warn_once.cache_clear()
    return make


@pytest.fixture
def gpu(new_gpu):
    return new_gpu()
