"""Detects races: two threads access one address, at least one of them writes, and no barrier orders the accesses.

A barrier of the thread block orders accesses and begins a new epoch. Within a warp, bar.warp.sync orders accesses, too,
and begins a new epoch of the warp. Accesses of different thread blocks are never ordered. For every granule of memory,
the detector stores the last writer, and the lowest and highest reader of an epoch.
"""

from __future__ import annotations

import numpy as np


class Races:
    """The accesses to one memory. Indices count granules. Thread numbers count all threads of the grid."""

    def __init__(self, granules: int) -> None:
        self.writer = np.full(granules, -1, np.int64)
        self.write_epoch = np.full(granules, -1, np.int64)
        self.write_warp_epoch = np.full(granules, -1, np.int64)
        self.read_epoch = np.full(granules, -1, np.int64)
        self.first_reader = np.full(granules, -1, np.int64)
        self.last_reader = np.full(granules, -1, np.int64)
        self.read_warp_epoch = np.full(granules, -1, np.int64)
        self.first_in_warp = np.full(granules, -1, np.int64)
        self.last_in_warp = np.full(granules, -1, np.int64)

    def _after_write(self, at, thread, epoch, warp_epoch, block_threads) -> np.ndarray:
        """Returns which accesses are not ordered after the last write to their granule."""
        writer = self.writer[at]
        other = (writer >= 0) & (writer != thread)
        elsewhere = writer // block_threads != thread // block_threads
        unordered = self.write_epoch[at] == epoch
        same_warp = writer // 32 == thread // 32
        unordered &= ~same_warp | (self.write_warp_epoch[at] == warp_epoch)
        return other & (elsewhere | unordered)

    def read(self, at, thread, epoch, warp_epoch, block_threads) -> np.ndarray:
        conflict = self._after_write(at, thread, epoch, warp_epoch, block_threads)
        for stamp, now, first, last in (
            (self.read_epoch, epoch, self.first_reader, self.last_reader),
            (self.read_warp_epoch, warp_epoch, self.first_in_warp, self.last_in_warp),
        ):
            fresh = stamp[at] != now
            low = np.where(fresh, thread, np.minimum(first[at], thread))
            high = np.where(fresh, thread, np.maximum(last[at], thread))
            last[at] = high  # threads are in ascending order: NumPy keeps the last, the highest
            first[at[::-1]] = low[::-1]
            stamp[at] = now
        return conflict

    def write(self, at, thread, epoch, warp_epoch, block_threads) -> tuple[np.ndarray, np.ndarray]:
        """Returns which writes conflict with earlier accesses, and which are overwritten in the same instruction."""
        conflict = self._after_write(at, thread, epoch, warp_epoch, block_threads)
        first, last = self.first_reader[at], self.last_reader[at]
        read = (self.read_epoch[at] == epoch) & ((first // 32 != thread // 32) | (last // 32 != thread // 32))
        first, last = self.first_in_warp[at], self.last_in_warp[at]
        read |= (self.read_warp_epoch[at] == warp_epoch) & ((first != thread) | (last != thread))
        self.writer[at] = thread
        self.write_epoch[at] = epoch
        self.write_warp_epoch[at] = warp_epoch
        return conflict | read, self.writer[at] != thread
