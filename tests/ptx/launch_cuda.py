"""Runs the package's CUDA C++ backend on CPU tensors: everything is real but the GPU.

NVRTC compiles the kernels that a call needs to PTX, and the package's library loads and launches them through the
stand-in of driver.py, which hands every launch to the emulator.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .build import FOLDER
from .device import Device, poison
from .driver import driver

# Number of the GPU; bytes of shared memory of a block and of a processor. Short sequences get blocks of one warp on
# sm_90; where a processor has little room they get several; where a block has little, long sequences go row by row.
GPUS = {"sm_90": (1, 232448, 233472), "crowded": (2, 232448, 30000), "small": (3, 16384, 16384)}
ARCHITECTURE = 80  # its PTX is what newer GPUs translate as well


class _Scratch(TorchDispatchMode):
    """Memory that the library allocates becomes known to the device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.device.know(result, "scratch")
        storage = result.untyped_storage()
        poison(storage.data_ptr(), storage.nbytes())
        return result


class _Operators:
    """The library's operators; what they are given becomes known to the device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.library = torch.ops.minilm_kernels_cuda
        self.refusal, self.capability, self.load = self.library.refusal, self.library.capability, self.library.load

    def relation_kl(self, *arguments) -> str:
        self.device.memory.clear()
        names = ("teacher", "student", "", "", "tokens", "starts", "prefixes", "", "", "", "weights", "row_grads",
                 "values", "rows", "grads", "", "")  # fmt: skip
        for name, x in zip(names, arguments, strict=True):
            if isinstance(x, torch.Tensor):
                self.device.know(x, name)
            elif name and isinstance(x, (list, tuple)):
                for k, tensor in enumerate(x):
                    self.device.know(tensor, f"{name}[{k}]")
        with _Scratch(self.device):  # which is to see what the operator calls, and not the operator
            missing = self.library.relation_kl.default.redispatch(
                torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments
            )
        self.device.check()
        return missing


@contextmanager
def cuda_backend(device: Device, gpu: str, folder: Path = FOLDER):
    """Within, `backend="cuda"` serves CPU tensors by emulation on one of GPUS; yields the PTX modules loaded so far."""
    from minilm_kernels.relation import dispatch
    from minilm_kernels.relation.backends import cuda_compiler, native_cuda
    from minilm_kernels.relation.backends.cuda_cache import KernelCache

    if not native_cuda._LIBRARY.exists():
        raise RuntimeError(
            f"{native_cuda._LIBRARY} is not built: MINILM_KERNELS_BUILD=native python setup.py build_ext --inplace"
        )
    if reason := cuda_compiler.unavailable_reason():
        raise RuntimeError(reason)
    standin = driver(folder)
    number, *shared = GPUS[gpu]
    standin.set_gpu(number, ARCHITECTURE, *shared)
    torch.ops.load_library(native_cuda._LIBRARY)

    cache = KernelCache(folder / "kernels")
    as_ptx = partial(cuda_compiler.compile_kernels, target="ptx", line_info=True)
    replaced = {
        (native_cuda, "_operators"): _Operators(device),
        (native_cuda, "_DEVICE"): "cpu",
        (native_cuda, "_place"): lambda _device: (number, 0),
        (native_cuda, "_cache"): lambda: cache,
        (native_cuda, "unavailable_reason"): lambda: None,
        (cuda_compiler, "compile_kernels"): as_ptx,
    }
    before = {(module, name): getattr(module, name) for module, name in replaced}
    previous, module = standin.device, dispatch.MODULES["cuda"]
    for (place, name), value in replaced.items():
        setattr(place, name, value)
    dispatch.MODULES["cuda"] = native_cuda
    standin.device = device
    try:
        yield standin.ptx
    finally:
        for (place, name), value in before.items():
            setattr(place, name, value)
        dispatch.MODULES["cuda"] = module
        standin.device = previous
