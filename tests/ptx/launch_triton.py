"""Runs the package's Triton backend on CPU tensors; only the GPU is emulated.

Triton compiles for the requested compute capability, chooses specialisations and packs arguments with its own launcher.
The launcher calls the replaced driver library (driver.py), which passes every launch to the emulator.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from .build import FOLDER
from .device import Device
from .driver import driver as standin_driver
from .parser import parse

ARCHITECTURES = {80: 166912, 90: 232448}  # compute capability: largest shared memory of a block


def _tensors(arguments, name: str):
    for k, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            yield f"{name}[{k}]", x
        elif isinstance(x, tuple):
            yield from _tensors(x, f"{name}[{k}]")


def _forget_compiled() -> None:
    """Unloads compiled kernels, because a kernel stays bound to the driver that loaded it."""
    from minilm_kernels.relation.backends.triton import gradient, row_kl, row_stats, unordered

    for module in (gradient, row_kl, row_stats, unordered):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()
    gc.collect()  # unloads the kernels while their driver still exists


@contextmanager
def triton_backend(device: Device, architecture: int, folder: Path = FOLDER):
    """Makes `backend="triton"` serve CPU tensors by emulation; `architecture` is 80 (mma.sync) or 90 (wgmma)."""
    standin = standin_driver(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(standin.path.parent)  # never reset: Triton's launcher stays loaded
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from minilm_kernels.relation.backends.triton import launch as backend

    def loaded(_module, function, name, files, _hash) -> None:
        text = next(Path(path) for key, path in files.items() if key.endswith(".ptx")).read_text(encoding="utf-8")
        standin.kernels[function] = parse(text)[name]

    standin.set_gpu(0, architecture, ARCHITECTURES[architecture], ARCHITECTURES[architecture] + 1024)

    class Launcher(CudaLauncher):
        def __init__(self, source, metadata) -> None:
            super().__init__(source, metadata)
            self.names = source.fn.arg_names

        def __call__(self, *arguments) -> None:
            device.memory.clear()
            given = arguments[9:]
            for name, x in zip(self.names, given, strict=True):
                for label, tensor in _tensors((x,), name):
                    device.know(tensor, label)
            super().__call__(*arguments)
            device.check()

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils = CudaUtils()
            self.launcher_cls = Launcher
            self.get_device_capability = lambda _device=0: divmod(architecture, 10)
            self.get_current_stream = lambda _device=0: 0
            self.get_current_device = lambda: 0
            self.set_current_device = lambda _device: None

    replaced = {
        "unavailable_reason": lambda: None,
        "interpreted": lambda: False,
        "unsupported_reasons": lambda inputs: [],
        "_gpu": lambda device: (1, architecture),  # so small that a few heads fill it, and fewer are split
    }
    before = {name: getattr(backend, name) for name in replaced}
    previous_device, standin.device = standin.device, device
    previous_hook = knobs.runtime.kernel_load_end_hook
    knobs.runtime.kernel_load_end_hook = loaded
    driver.set_active(Driver())
    _forget_compiled()
    for name, function in replaced.items():
        setattr(backend, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(backend, name, function)
        knobs.runtime.kernel_load_end_hook = previous_hook
        standin.device = previous_device
        _forget_compiled()
        driver._active = None
