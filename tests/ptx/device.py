"""The emulated GPU, as the host code sees it: its memory, kernels and launches."""

from __future__ import annotations

import ctypes
import time

import torch
from torch.overrides import TorchFunctionMode

from . import machine
from .findings import Findings
from .memory import POISON, GlobalMemory
from .parser import Kernel


class Device:
    """Memory, findings and statistics of the launches since the last `reset`."""

    def __init__(self, races: bool = True) -> None:
        self.memory = GlobalMemory()
        self.findings = Findings()
        self.races = races
        self.errors: list[BaseException] = []  # errors of callbacks, which C code would discard
        self.kernels: dict[int, Kernel] = {}  # every kernel that was ever launched
        self.launches: list[tuple[str, tuple, int, float]] = []  # kernel, grid, instructions of warps, seconds

    def reset(self) -> None:
        self.memory.clear()
        self.findings.take()
        self.errors.clear()
        self.launches.clear()

    def know(self, tensor: torch.Tensor, name: str) -> None:
        """Allows kernels to access the whole storage of a tensor."""
        storage = tensor.untyped_storage()
        self.memory.add(storage.data_ptr(), storage.nbytes(), name)

    def launch(self, kernel: Kernel | None, sizes, shared: int, parameters) -> None:
        """Runs a kernel. `parameters`: address of an array of addresses, as in the driver's launch call."""
        try:
            if kernel is None:
                raise RuntimeError("the launched kernel was not loaded here")
            values = (ctypes.c_void_p * len(kernel.parameters)).from_address(parameters)
            content = bytearray(kernel.parameter_bytes)
            for parameter, value in zip(kernel.parameters, values, strict=True):
                content[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(value, parameter.size)
            grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
            self.kernels[id(kernel)] = kernel
            begin = time.perf_counter()
            executed = machine.run(
                machine.Launch(kernel, grid, block, shared, bytes(content), self.memory, self.findings, self.races)
            )
            self.launches.append((kernel.name, grid, executed, time.perf_counter() - begin))
        except BaseException as error:  # `check` raises it again
            self.errors.append(error)

    def check(self) -> None:
        if self.errors:
            raise self.errors[0]


class Poisoned(TorchFunctionMode):
    """Fills the memory of torch.empty and similar functions with a NaN that the emulator recognizes."""

    _FRESH = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if function in self._FRESH:
            poison(result.untyped_storage().data_ptr(), result.untyped_storage().nbytes())
        return result


def poison(address: int, size: int) -> None:
    words = (ctypes.c_uint32 * (size // 4)).from_address(address) if size >= 4 else []
    if size >= 4:
        words[:] = [int(POISON)] * (size // 4)
