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
        self.loaded: set[tuple[int, str]] = set()  # device, kernel
        self.failed: dict[tuple[int, str], str] = {}  # kernels that are not tried again, and why
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
            BackendUnavailable: a kernel does not compile or load, now or in an earlier call, or `limit` is reached.
                Calls that do not need this kernel are not affected.
        """
        with self._lock:
            names = [name for name in names if (device, name) not in self.loaded]
            if not names:  # another thread has loaded them
                return
            for name in names:
                if reason := self.failed.get((device, name)):
                    raise BackendUnavailable(reason)
            if len(self.loaded) + len(names) > self.limit:
                raise BackendUnavailable(
                    f"this process compiled kernels for many shapes; it does not load more than {self.limit} kernels"
                )
            failing = names
            try:
                code = cuda_compiler.compile_kernels(names, operators.capability(device), cache=self.cache)
                for name in names:
                    failing = [name]
                    operators.load(name, torch.frombuffer(bytearray(code[name]), dtype=torch.uint8), device)
                    self.loaded.add((device, name))
            except RuntimeError as error:
                if isinstance(error, cuda_compiler.CompilerError) and error.kernel:
                    failing = [error.kernel]
                self.failed.update(dict.fromkeys(((device, name) for name in failing), str(error)))
                raise BackendUnavailable(str(error)) from error
