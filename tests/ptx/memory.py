"""The memory of a kernel: global, shared and parameter memory.

Addresses are numbers, as on a device. Global memory is host memory: a tensor's data pointer is its address. Shared
memory and kernel parameters each have a window of generic addresses.
"""

from __future__ import annotations

import ctypes

import numpy as np

SHARED_WINDOW = 0x7F00_0000_0000_0000
PARAMETER_WINDOW = 0x7E00_0000_0000_0000
POISON = np.uint32(0x7FC0DEAD)  # a NaN that marks global memory as uninitialised

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}


class GlobalMemory:
    """The host buffers that a launch may touch."""

    def __init__(self) -> None:
        self.buffers: dict[int, tuple[int, str]] = {}  # address -> (bytes, name)
        self._stale = True

    def add(self, address: int, size: int, name: str) -> None:
        if size and address:
            self.buffers[address] = (size, name)
            self._stale = True

    def clear(self) -> None:
        self.buffers.clear()
        self._stale = True

    def prepare(self) -> None:
        """Makes an array of the memory from the first to the last buffer. Only bytes of buffers are ever accessed."""
        if not self._stale:
            return
        self._stale = False
        self.begins = np.array(sorted(self.buffers) or [0], np.uint64)
        self.ends = np.array([int(b) + self.buffers.get(int(b), (0,))[0] for b in self.begins], np.uint64)
        self.base = int(self.begins[0]) & ~15
        sizes = (self.ends - self.begins).astype(np.int64)
        self.places = np.concatenate(([0], np.cumsum(-(-sizes // 16) * 16)))  # offsets of the buffers without gaps
        span = -(-(int(self.ends.max()) - self.base) // 16) * 16 if self.buffers else 16
        raw = (ctypes.c_uint8 * span).from_address(self.base) if self.buffers else (ctypes.c_uint8 * span)()
        everything = np.frombuffer(raw, np.uint8)
        self.views = {size: everything.view(dtype) for size, dtype in UNSIGNED.items()}

    def inside(self, address: np.ndarray, size: int) -> np.ndarray:
        which = np.searchsorted(self.begins, address, "right") - 1
        return (which >= 0) & (address + np.uint64(size) <= self.ends[which])

    def name_of(self, address: int) -> str:
        """A description of an address: the buffer, and the byte in it."""
        which = int(np.searchsorted(self.begins, np.uint64(address), "right")) - 1
        if which < 0:
            return "before all buffers"
        begin = int(self.begins[which])
        size, name = self.buffers[begin]
        return f"byte {address - begin} of {name}, which has {size}"

    def side_by_side(self, index: np.ndarray) -> np.ndarray:
        """Indices into the array, counted without the gaps between buffers."""
        address = index.astype(np.uint64) + np.uint64(self.base)
        which = np.searchsorted(self.begins, address, "right") - 1
        return self.places[which] + (address - self.begins[which]).astype(np.int64)

    def index(self, address: np.ndarray) -> np.ndarray:
        return (address - np.uint64(self.base)).astype(np.int64)


class SharedMemory:
    """Shared memory of all emulated thread blocks, one after another. `written` marks the bytes that were written."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = max(16, -(-size // 16) * 16)
        self.data = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.written = np.zeros_like(self.data)
        self.unfenced = np.zeros(self.data.size // 2, bool)  # ordinary stores that wgmma may not see yet
        self.views = {n: self.data.view(dtype) for n, dtype in UNSIGNED.items()}
        self.marks = {n: self.written.view(dtype) for n, dtype in UNSIGNED.items()}


class ParameterMemory:
    """The launch's parameter buffer, the same for all threads."""

    def __init__(self, content: bytes) -> None:
        self.size = len(content)
        padded = content + bytes(-len(content) % 16 + 16)
        self.data = np.frombuffer(padded, np.uint8)
        self.views = {size: self.data.view(dtype) for size, dtype in UNSIGNED.items()}
