"""Runs the package's CUDA C++ backend on CPU tensors: everything is real but the GPU.

The library of compile_cuda.py hands every launch to the emulator, which executes the PTX of the same compilation.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from pathlib import Path

import torch

from .build import FOLDER
from .compile_cuda import OPERATORS, compile_library
from .device import Device, poison

# Bytes of shared memory: of a block, of a processor. Short sequences get blocks of one warp on sm_90; where a processor
# has little room they get several; where a block has little, long sequences go row by row.
GPUS = {"sm_90": (232448, 233472), "crowded": (232448, 30000), "small": (16384, 16384)}


class _Operators:
    """The library's operators; what they are given becomes known to the device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.library = getattr(torch.ops, OPERATORS)
        self.refusal = self.library.refusal

    def relation_kl(self, *arguments) -> None:
        self.device.memory.clear()
        names = ("teacher", "student", "", "", "tokens", "starts", "prefixes", "", "", "", "weights", "row_grads",
                 "values", "rows", "grads", "")  # fmt: skip
        for name, x in zip(names, arguments, strict=True):
            if isinstance(x, torch.Tensor):
                self.device.know(x, name)
            elif name and isinstance(x, (list, tuple)):
                for k, tensor in enumerate(x):
                    self.device.know(tensor, f"{name}[{k}]")
        self.library.relation_kl(*arguments)
        self.device.check()


@contextmanager
def cuda_backend(device: Device, limits: tuple[int, int], folder: Path = FOLDER):
    """Within, `backend="cuda"` serves CPU tensors by emulation; yields the PTX modules. `limits`: one of GPUS."""
    from minilm_kernels.relation import native_cuda, operator

    path, modules = compile_library(folder)
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    launch_type = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint64, ctypes.c_void_p
    )
    scratch_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)

    def scratch(address: int | None, size: int) -> None:
        if address and size:
            device.memory.add(address, size, "scratch")
            poison(address, size)

    def launch(name: bytes, sizes, shared: int, values: int) -> None:
        module = next(module for module in modules if name.decode() in module.entries)
        device.launch(module[name.decode()], sizes, shared, values)

    callbacks = (launch_type(launch), scratch_type(scratch))
    library.emulator_set_launch(callbacks[0])
    library.emulator_set_scratch(callbacks[1])
    library.emulator_set_limits(*limits, 90)
    replaced = {"_operators": _Operators(device), "_DEVICE": "cpu", "unavailable": lambda: None}
    before = {name: getattr(native_cuda, name) for name in replaced}
    for name, value in replaced.items():
        setattr(native_cuda, name, value)
    module = operator._MODULES["cuda"]
    operator._MODULES["cuda"] = native_cuda
    try:
        yield modules
    finally:
        for name, value in before.items():
            setattr(native_cuda, name, value)
        operator._MODULES["cuda"] = module
