"""Runs the package's CUDA C++ backend on CPU tensors. Only the GPU is emulated.

NVRTC compiles the kernels of a call to PTX. The package's library loads and launches them through the replaced driver
library (driver.py), which passes every launch to the emulator.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .build import FOLDER
from .device import Device, poison
from .driver import driver

# Number and compute capability of the GPU, and bytes of shared memory per block and per SM. PTX for 8.0 also runs on
# newer GPUs; 10.0 has instructions of its own. With the memory of sm_90, short sequences get blocks of one warp.
# With little memory per SM, they get several warps. With little memory per block, long sequences take the row-wise path
# or, with strips, windows: of two strips of (16, 8) in bfloat16 in "windows".
GPUS = {
    "sm_90": (1, 80, 232448, 233472),
    "crowded": (2, 80, 232448, 30000),
    "small": (3, 80, 16384, 16384),
    "windows": (4, 80, 20736, 21760),
    "crowded sm_100": (5, 100, 232448, 30000),
    "windows sm_100": (6, 100, 20736, 21760),
}


class _Scratch(TorchDispatchMode):
    """Registers the memory that the library allocates, so that kernels on the device may access it."""

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
    """Wraps the library's operators and registers their tensors, so that kernels on the device may access them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.library = torch.ops.minilm_kernels_cuda
        self.unsupported_reason, self.capability = self.library.unsupported_reason, self.library.capability
        self.load = self.library.load

    def relation_kl(self, *arguments) -> str:
        return self._run(self.library.relation_kl.default, arguments)

    def scale(self, *arguments) -> str:
        return self._run(self.library.scale.default, arguments)

    def _run(self, operator, arguments) -> str:
        self.device.memory.clear()
        for argument, x in zip(operator._schema.arguments, arguments, strict=True):
            for k, tensor in enumerate(x if isinstance(x, (list, tuple)) else [x]):
                if isinstance(tensor, torch.Tensor):
                    self.device.know(tensor, f"{argument.name}[{k}]")
        with _Scratch(self.device):  # sees the operator's own calls only
            missing = operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
        self.device.check()
        return missing


@contextmanager
def cuda_backend(device: Device, gpu: str, folder: Path = FOLDER):
    """Emulates `backend="cuda"` for CPU tensors on one of GPUS. Yields the PTX modules loaded so far."""
    from minilm_kernels.relation.backends import cuda_compiler, native
    from minilm_kernels.relation.backends.cuda_cache import KernelCache

    if not native.cuda.library.exists():
        raise RuntimeError(
            f"{native.cuda.library} is not built: MINILM_KERNELS_BUILD=native python setup.py build_ext --inplace"
        )
    if reason := cuda_compiler.unavailable_reason():
        raise RuntimeError(reason)
    standin = driver(folder)
    number = GPUS[gpu][0]
    standin.set_gpu(*GPUS[gpu])
    torch.ops.load_library(native.cuda.library)

    as_ptx = partial(cuda_compiler.compile_kernels, target="ptx", line_info=True)
    with ExitStack() as replaced:
        for target, name, value in (
            (native.cuda, "operators", _Operators(device)),
            (native.cuda, "device_type", "cpu"),
            (native.cuda, "device", lambda _device: (number, 0)),
            (native.cuda, "load_error", None),
            (native.cuda, "reasons", {}),
            (native.cuda.loader, "cache", KernelCache(folder / "kernels")),
            (cuda_compiler, "compile_kernels", as_ptx),
            (standin, "device", device),
        ):
            replaced.enter_context(patch.object(target, name, value))
        yield standin.ptx
