"""Runs the package's Triton backend on CPU tensors: everything is real but the GPU.

Triton compiles for the compute capability asked for, chooses specialisations and packs arguments with its own launcher;
the driver library beneath it is native/libcuda.c, which hands every launch to the emulator.
"""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import contextmanager
from pathlib import Path

import torch

from .build import FOLDER, NATIVE, compiled, kept
from .device import Device
from .parser import Kernel, parse

ARCHITECTURES = {80: 166912, 90: 232448}  # compute capability: bytes of shared memory that a block may have


def _library(folder: Path) -> Path:
    import triton

    include, source = Path(triton.__file__).parent / "backends/nvidia/include", NATIVE / "libcuda.c"

    def make(place: Path) -> None:
        flags = ["-O1", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        compiled(["gcc", *flags, str(source), "-o", str(place / "libcuda.so.1")], "the stand-in of the driver library")

    return kept(folder, "libcuda", [source, include / "cuda.h"], make) / "libcuda.so.1"


def _tensors(arguments, name: str):
    for k, x in enumerate(arguments):
        if isinstance(x, torch.Tensor):
            yield f"{name}[{k}]", x
        elif isinstance(x, tuple):
            yield from _tensors(x, f"{name}[{k}]")


def _forget_compiled() -> None:
    """Kernels that are loaded stay bound to the driver that has loaded them."""
    from minilm_kernels.relation import triton_kernels

    for kernel in vars(triton_kernels).values():
        if hasattr(kernel, "device_caches"):
            kernel.device_caches.clear()
    gc.collect()  # they are unloaded through the driver that is still there


@contextmanager
def triton_backend(device: Device, architecture: int, folder: Path = FOLDER):
    """Within, `backend="triton"` serves CPU tensors by emulation; `architecture`: 80 (mma.sync) or 90 (wgmma)."""
    path = _library(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)  # for good: what Triton builds with it stays loaded
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    from minilm_kernels.relation import triton_backend as backend

    kernels: dict[int, Kernel] = {}

    def loaded(_module, function, name, files, _hash) -> None:
        text = next(Path(path) for key, path in files.items() if key.endswith(".ptx")).read_text(encoding="utf-8")
        kernels[function] = parse(text)[name]

    callback_type = ctypes.CFUNCTYPE(
        None, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_void_p
    )
    callback = callback_type(
        lambda function, sizes, shared, parameters: device.launch(kernels.get(function), sizes, shared, parameters)
    )
    library.emulator_set_launch(callback)
    library.emulator_set_capability(ctypes.c_uint64(architecture), ctypes.c_uint64(ARCHITECTURES[architecture]))

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

    replaced = {"unavailable": lambda: None, "interpreted": lambda: False, "refusals": lambda problem: []}
    before = {name: getattr(backend, name) for name in replaced}
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
        _forget_compiled()
        driver._active = None
