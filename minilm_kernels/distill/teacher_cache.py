"""`TeacherCache`: the teacher's queries, keys and values on disk, so that several students cost one teacher.

An entry belongs to a place in the endless sequence of training samples. The sequence depends on text and seed, not on
the number of processes or the size of a batch. Every epoch shuffles the documents and cuts them at other tokens, so it
has entries of its own.

An entry is a header, with a hash of its tokens and a checksum of its values, and the values of all its tokens: queries,
keys, values. All entries of a file have equal distances. An entry that was not completely written, or is damaged, fails
its checksum and is computed again; several processes may therefore write the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from minilm_kernels.losses import QKV

from .checkpoint import TEMPORARY, write_error
from .console import say
from .packing import PADDING, Samples

FORMAT = 1
ENTRIES_A_FILE = 256
WRITES_BEHIND = 2  # micro-batches that wait for the disk, before the steps wait, too
_MAGIC = b"MINILMQK"
# Magic, hash of the tokens, number of tokens, checksum of the values; and the checksum of these four.
_FIELDS, _CHECKSUM = struct.Struct("<8s8sII"), struct.Struct("<I")
_HEADER_BYTES = _FIELDS.size + _CHECKSUM.size
_PAGE = 4096


class TeacherCache:
    """The teacher's queries, keys and values of training samples, in a folder.

    Args:
        folder: the folder of all teachers and settings; each has a folder of its own in it.
        key: everything besides the tokens on which the values depend, as JSON.
        widths: last dimensions of query, key and value.
        max_seq_length: tokens of the longest sample.
        packed: True if the loss takes the valid tokens of all samples, (T, hidden); False for (B, S, hidden).
        dtype: type of the stored values, torch.bfloat16 or torch.float32.
        pinned: True to read into pinned memory, for copies to a CUDA device.

    Attributes:
        folder: the folder of this teacher and these settings.

    Raises:
        OSError: the folder cannot be created.
        ValueError: its header is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import torch
        >>> from minilm_kernels import QKV
        >>> from minilm_kernels.distill.packing import Samples
        >>> from minilm_kernels.distill.teacher_cache import TeacherCache
        >>> cache = TeacherCache(
        ...     Path(tempfile.mkdtemp()), {"teacher": "bert"}, (4, 4, 4), 3, packed=True, dtype=torch.bfloat16
        ... )
        >>> samples = Samples(np.array([[5, 6, 7]], np.int32), np.array([[0, 1, 2]], np.int32))
        >>> cache.read(0, samples) is None
        True
        >>> rounded = cache.store(0, samples, QKV(*torch.randn(3, 3, 4)))
        >>> cache.close()
        >>> torch.equal(cache.read(0, samples).key, rounded.key)
        True
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        widths: Sequence[int],
        max_seq_length: int,
        *,
        packed: bool,
        dtype: torch.dtype,
        pinned: bool = False,
    ) -> None:
        self._widths, self._packed, self._dtype, self._pinned = tuple(widths), packed, dtype, pinned
        self.sample_bytes = max_seq_length * sum(widths) * dtype.itemsize
        self._stride = -(-(_HEADER_BYTES + self.sample_bytes) // _PAGE) * _PAGE
        described = {"format": FORMAT, "dtype": str(dtype), "widths": widths, "max_seq_length": max_seq_length, **key}
        header = json.dumps(described, indent=1, sort_keys=True) + "\n"
        self.folder = folder / hashlib.sha256(header.encode()).hexdigest()[:16]
        self._thread = ThreadPoolExecutor(1, "minilm-cache")
        self._writes: deque[Future[None]] = deque()
        self._full = self._damaged = False
        self._saying = threading.Lock()  # two threads read if memory runs out
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_once(self.folder / "header.json", header)
        except OSError as error:
            raise write_error(error, self.folder) from error

    def close(self) -> None:
        """Waits until everything is written."""
        self._thread.shutdown()
        while self._writes:
            self._writes.popleft().result()

    def check_room(self, samples: int) -> str:
        """Checks that the first `samples` samples of the sequence have room on the disk.

        Returns:
            The size in words.

        Raises:
            OSError: the disk has too little room.
        """
        needed = samples * self._stride
        stored = sum(path.stat().st_blocks * 512 for path in self.folder.glob("*.bin"))
        free = shutil.disk_usage(self.folder).free
        tokens = self.sample_bytes // (sum(self._widths) * self._dtype.itemsize)
        size = (
            f"{samples} samples x {tokens} tokens x {sum(self._widths)} values x {self._dtype.itemsize} bytes are up "
            f"to {_gigabytes(needed)}, of which {_gigabytes(stored)} are stored; {self.folder} has room for "
            f"{_gigabytes(free)}"
        )
        if needed - stored > free:
            raise OSError(f"--cache-teacher: {size}; use another disk, or leave out this option")
        return size

    def read(self, first: int, samples: Samples) -> QKV | None:
        """The stored values of a micro-batch, on the CPU; `None` if those of a sample are missing.

        Args:
            first: number of the first sample in the endless sequence.
            samples: (samples, max_seq_length).

        Raises:
            ValueError: an entry belongs to other tokens.
        """
        lengths = _lengths(samples)
        shape = (sum(lengths),) if self._packed else (len(lengths), max(lengths))
        found = QKV(
            *(torch.zeros(*shape, w, dtype=self._dtype, pin_memory=self._pinned) for w in self._widths)  # padding is 0
        )
        for index, (row, parts) in enumerate(zip(zip(*samples, strict=True), self._rows(found, lengths), strict=True)):
            if not self._read(first + index, row, parts):
                return None
        return found

    def store(self, first: int, samples: Samples, teacher: QKV) -> QKV:
        """Stores the values of a micro-batch, on a thread.

        Args:
            first: number of the first sample in the endless sequence.
            samples: (samples, max_seq_length).
            teacher: the values in the layout of the loss.

        Returns:
            The values in the cache's type, as `read` returns them later.
        """
        rounded = QKV(*(x.to(self._dtype) for x in teacher))
        if self._full:
            return rounded
        copies, copied = rounded, None
        if rounded.query.is_cuda:
            copies = QKV(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in rounded))
            for copy, x in zip(copies, rounded, strict=True):
                copy.copy_(x, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        while len(self._writes) >= WRITES_BEHIND:
            self._writes.popleft().result()
        self._writes.append(self._thread.submit(self._write, first, samples, copies, copied))
        return rounded

    def _rows(self, qkv: QKV, lengths: Sequence[int]) -> Iterator[list[Tensor]]:
        """Query, key and value of each sample, each (tokens, hidden)."""
        end = 0
        for index, length in enumerate(lengths):
            end += length
            yield [x[end - length : end] if self._packed else x[index, :length] for x in qkv]

    def _entry(self, number: int) -> tuple[Path, int]:
        """File and offset of an entry."""
        file, place = divmod(number, ENTRIES_A_FILE)
        return self.folder / f"{file:08d}.bin", place * self._stride

    def _read(self, number: int, sample: tuple[np.ndarray, np.ndarray], parts: Sequence[Tensor]) -> bool:
        path, offset = self._entry(number)
        views = list(map(_bytes, parts))
        problem, header, complete = "is damaged", b"?", False
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                header = file.read(_HEADER_BYTES)
                complete = all(file.readinto(view) == len(view) for view in views)
        except FileNotFoundError:
            return False
        except OSError as error:
            problem = f"cannot be read ({error})"
        if not any(header):  # a part of the file that was never written
            return False
        fields, own = header[: _FIELDS.size], header[_FIELDS.size :]
        if own == _CHECKSUM.pack(zlib.crc32(fields)):
            magic, tokens, count, checksum = _FIELDS.unpack(fields)
            if (magic, tokens, count) != (_MAGIC, _token_hash(*sample), len(parts[0])):
                raise ValueError(
                    f"--cache-teacher: {path} has the values of other tokens for sample {number}; remove the folder "
                    f"{self.folder}"
                )
            if complete and _checksum(views) == checksum:
                return True
        with self._saying:
            first, self._damaged = not self._damaged, True
        if first:
            say(f"--cache-teacher: {path} {problem} at sample {number}; the teacher runs again for such samples")
        return False

    def _write(self, first: int, samples: Samples, qkv: QKV, copied: torch.cuda.Event | None) -> None:
        if self._full:  # found out by an earlier write, after this one was submitted
            return
        if copied is not None:
            copied.synchronize()
        lengths = _lengths(samples)
        try:
            for index, parts in enumerate(self._rows(qkv, lengths)):
                path, offset = self._entry(first + index)
                views = [_bytes(part.contiguous()) for part in parts]
                tokens = _token_hash(samples.ids[index], samples.positions[index])
                fields = _FIELDS.pack(_MAGIC, tokens, lengths[index], _checksum(views))
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                    file.seek(offset + _HEADER_BYTES)
                    for view in views:
                        file.write(view)
                    file.seek(offset)  # the header comes last: until then, there is no entry to read
                    file.write(fields + _CHECKSUM.pack(zlib.crc32(fields)))
        except OSError as error:
            self._full = True
            say(f"--cache-teacher: {self.folder} cannot be written, and later samples are not stored: {error}")


def _write_once(path: Path, content: str) -> None:
    """Writes a file atomically. Raises `ValueError` if it exists with another content."""
    if not path.exists():
        temporary = path.with_name(f"{TEMPORARY}{uuid4().hex}")
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    elif path.read_bytes() != content.encode():
        raise ValueError(f"--cache-teacher: {path} is damaged; remove the folder {path.parent}")


def _lengths(samples: Samples) -> list[int]:
    """Number of tokens of each sample."""
    return (samples.positions != PADDING).sum(1).tolist()


def _token_hash(ids: np.ndarray, positions: np.ndarray) -> bytes:
    valid = positions != PADDING
    return hashlib.blake2b(ids[valid].tobytes() + positions[valid].tobytes(), digest_size=8).digest()


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    return tensor.detach().view(torch.uint8).numpy().data.cast("B")


def _checksum(views: Sequence[memoryview]) -> int:
    checksum = 0
    for view in views:
        checksum = zlib.crc32(view, checksum)
    return checksum


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
