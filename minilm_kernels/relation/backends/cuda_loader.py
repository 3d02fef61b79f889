"""Compiles the CUDA kernels that a call needs and loads them on its device."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import torch

from minilm_kernels.relation.inputs import BackendUnavailable

from . import cuda_compiler
from .cuda_cache import KernelCache


class KernelLoader:
    """The kernels that this process has loaded, on all its devices."""

    limit = 256  # loaded kernels: a process with ever changing shapes must not compile forever

    def __init__(self) -> None:
        self.error: str | None = None  # reason why kernels could not be compiled or loaded
        self.loaded: set[tuple[int, str]] = set()  # device, kernel
        self._lock = threading.Lock()

    @cached_property
    def cache(self) -> KernelCache:
        """The cache of the process. Devices share it, and with it the kernels that could not be written to disk."""
        return KernelCache()

    def load(self, names: list[str], device: int, operators: Any) -> None:
        """Compiles kernels and loads them on a device.

        Args:
            names: kernels that the library's `relation_kl` reported as missing.
            device: number of the device.
            operators: the library's operators.

        Raises:
            BackendUnavailable: a kernel does not compile or load, or `limit` is reached.
        """
        with self._lock:
            names = [name for name in names if (device, name) not in self.loaded]
            if not names:  # another thread has loaded them
                return
            if len(self.loaded) + len(names) > self.limit:
                raise BackendUnavailable(
                    f"this process compiled kernels for many shapes; it does not load more than {self.limit} kernels"
                )
            try:
                code = cuda_compiler.compile_kernels(names, operators.capability(device), cache=self.cache)
                for name in names:
                    operators.load(name, torch.frombuffer(bytearray(code[name]), dtype=torch.uint8), device)
            except (cuda_compiler.CompilerError, RuntimeError) as error:
                self.error = str(error)
                raise BackendUnavailable(self.error) from error
            self.loaded.update((device, name) for name in names)
