"""Fixtures that run the CUDA backend on CPU tensors, with the driver library replaced by tests/ptx."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from minilm_kernels.relation import dispatch
from minilm_kernels.relation.backends import cuda_loader, native

_numbers = itertools.count(10)


class GPU:
    """A GPU that no other test has used. `calls` lists the calls of the driver: name and three arguments."""

    def __init__(self, capability: int = 90, smem_per_block: int = 232448, smem_per_sm: int = 233472) -> None:
        from tests.ptx.driver import driver

        self.number = next(_numbers)
        self.stream = 0
        self.driver = driver()
        self.driver.set_gpu(self.number, capability, smem_per_block, smem_per_sm)
        self.calls: list[tuple[str, int, int, int]] = []
        self.failing = ""  # name of a driver call that fails

    @property
    def context(self) -> int:
        return 1000 + self.number

    def of(self, name: str) -> list[tuple[int, int, int]]:
        """Arguments of each call of a driver function."""
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
    """Returns a function that creates a GPU. `backend="cuda"` uses the last one; its kernels do nothing."""
    if sys.platform != "linux":
        pytest.skip("the CUDA library is for Linux")
    if torch.cuda.is_available():
        pytest.skip("a real driver library is found instead of its replacement")
    assert native.cuda.library.exists(), "build the library: MINILM_KERNELS_BUILD=native setup.py build_ext --inplace"

    def make(*props: int) -> GPU:
        gpu = GPU(*props)
        torch.ops.load_library(native.cuda.library)
        monkeypatch.setattr(native.cuda, "device", lambda _device: (gpu.number, gpu.stream))
        return gpu

    monkeypatch.setattr(native.cuda, "load_error", None)
    monkeypatch.setattr(native.cuda, "loader", cuda_loader.KernelLoader())
    monkeypatch.setattr(native.cuda, "reasons", {})
    monkeypatch.setattr(native.cuda, "device_type", "cpu")
    dispatch._warned.clear()
    return make


@pytest.fixture
def gpu(new_gpu):
    return new_gpu()
