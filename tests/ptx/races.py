"""Races: two threads at one address, one of them writing, and nothing between them that orders them.

Accesses are ordered by a barrier of the thread block (its epoch), within a warp also by bar.warp.sync (the warp's
epoch). Thread blocks are never ordered. Every granule of memory remembers its last writer, and the lowest and highest
reader of an epoch.
"""

from __future__ import annotations

import numpy as np


class Races:
    """Shadow of one memory. Indices count granules; threads are numbered through the whole grid."""

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
        """Marks the accesses that may come before or after an earlier write."""
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
            last[at] = high  # threads come in ascending order: of several readers the last one stays
            first[at[::-1]] = low[::-1]
            stamp[at] = now
        return conflict

    def write(self, at, thread, epoch, warp_epoch, block_threads) -> tuple[np.ndarray, np.ndarray]:
        """Conflicts with earlier accesses, and whether another thread writes there in the same instruction."""
        conflict = self._after_write(at, thread, epoch, warp_epoch, block_threads)
        first, last = self.first_reader[at], self.last_reader[at]
        read = (self.read_epoch[at] == epoch) & ((first // 32 != thread // 32) | (last // 32 != thread // 32))
        first, last = self.first_in_warp[at], self.last_in_warp[at]
        read |= (self.read_warp_epoch[at] == warp_epoch) & ((first != thread) | (last != thread))
        self.writer[at] = thread
        self.write_epoch[at] = epoch
        self.write_warp_epoch[at] = warp_epoch
        return conflict | read, self.writer[at] != thread
