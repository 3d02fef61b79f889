"""The replacement for the driver library, native/libcuda.c. A process has one, with its GPUs, modules and launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from .build import FOLDER, NATIVE, compiled, kept
from .device import Device
from .parser import Kernel, Module, parse

_WORD, _UNSIGNED = ctypes.c_uint64, ctypes.c_uint
_CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, _WORD, ctypes.c_int64, ctypes.c_int64)
_LOAD = ctypes.CFUNCTYPE(None, _WORD, ctypes.c_void_p)
_FIND = ctypes.CFUNCTYPE(None, _WORD, _WORD, ctypes.c_char_p)
_LAUNCH = ctypes.CFUNCTYPE(None, _WORD, ctypes.POINTER(_UNSIGNED), _UNSIGNED, ctypes.c_void_p)


def build(folder: Path = FOLDER) -> Path:
    """Compiles the library and loads it with RTLD_GLOBAL, so that other libraries find it by its name."""
    source = NATIVE / "libcuda.c"

    def make(place: Path) -> None:
        flags = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        compiled(["gcc", *flags, str(source), "-o", str(place / "libcuda.so.1")], "the replaced driver library")

    return kept(folder, "libcuda", [source], make) / "libcuda.so.1"


class Driver:
    """Modules and kernels loaded through the library. Launches run on `device`, or do nothing if it is None."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.ptx: dict[int, Module] = {}
        self.functions: dict[int, tuple[int, str]] = {}  # module, name
        self.kernels: dict[int, Kernel] = {}  # kernels of modules in machine code; set by their creator
        self.device: Device | None = None
        self._callbacks = (_LOAD(self._load), _FIND(self._find), _LAUNCH(self._launch))
        self.library.emulator_set_callbacks(*self._callbacks)

    def set_gpu(self, number: int, capability: int, smem_per_block: int, smem_per_sm: int) -> None:
        """Defines a GPU. `smem_per_block`, `smem_per_sm`: bytes of shared memory."""
        self.library.emulator_set_device(number, capability, smem_per_block, smem_per_sm)

    @contextmanager
    def recorded(self, call: Callable[[str, int, int, int], int | None]) -> Iterator[None]:
        """Passes each driver call and three of its arguments to `call`, whose result becomes the call's error code."""
        callback = _CALL(lambda name, a, b, c: call(name.decode(), a, b, c) or 0)
        self.library.emulator_set_calls(callback)
        try:
            yield
        finally:
            self.library.emulator_set_calls(_CALL())

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Disables all callbacks to Python, so that launches take no time in the driver library."""
        self.library.emulator_set_callbacks(_LOAD(), _FIND(), _LAUNCH())
        try:
            yield
        finally:
            self.library.emulator_set_callbacks(*self._callbacks)

    def _load(self, module: int, image: int) -> None:
        if ctypes.string_at(image, 4) != b"\x7fELF":
            self.ptx[module] = parse(ctypes.string_at(image).decode())

    def _find(self, function: int, module: int, name: bytes) -> None:
        self.functions[function] = (module, name.decode())

    def _launch(self, function: int, sizes, shared: int, parameters: int) -> None:
        if self.device is None:
            return
        kernel = self.kernels.get(function)
        module, name = self.functions[function]
        if kernel is None and module in self.ptx:
            kernel = self.ptx[module][name]
        self.device.launch(kernel, sizes, shared, parameters)


@cache
def driver(folder: Path = FOLDER) -> Driver:
    return Driver(build(folder))
