"""Peak memory is measured, limits hold, and the largest batch is found."""

import mmap
import os
import signal

import pytest
import torch

from benchmarks.measure.memory import (
    OutOfMemory,
    freed_memory_returned,
    isolated,
    largest,
    memory_limit,
    peak_bytes,
    process_bytes,
)
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.workload import Workload
from benchmarks.providers import PROVIDERS

MIB = 2**20


def _filled(mib):
    return torch.ones(mib * MIB // 4)


def _hold_24_then_40():
    x = _filled(24)
    del x
    _filled(40)


def _hold_48_beside_the_allocator():
    bytearray(os.urandom(1)) * (48 * MIB)


def _peak_mib(step):
    step()
    return peak_bytes(step, "cpu") / MIB


def test_peak_is_what_is_held_at_once():
    assert 40 <= isolated(_peak_mib, _hold_24_then_40) < 46  # in a process whose other threads free nothing meanwhile


def test_peak_sees_memory_beside_the_allocator():
    assert 47 <= isolated(_peak_mib, _hold_48_beside_the_allocator) < 54


def _peak_mib_while_pages_of_a_file_are_taken(path):
    path.write_bytes(bytes(64 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        steps = 0

        def step():
            nonlocal steps
            steps += 1
            if steps < 4:  # the warm-up, the profiled run and one of those that measure the resident memory
                pages.madvise(mmap.MADV_DONTNEED)
            _hold_48_beside_the_allocator()
            assert not any(pages[:: mmap.PAGESIZE])  # maps all of them

        return _peak_mib(step)


def test_peak_while_the_system_takes_pages_of_files(tmp_path):
    assert 47 <= isolated(_peak_mib_while_pages_of_a_file_are_taken, tmp_path / "file") < 54


def test_allocations_beyond_the_limit_fail_and_the_limit_ends():
    with pytest.raises(OutOfMemory), memory_limit(64 * MIB, "cpu"):
        _filled(256)
    _filled(256)
    with memory_limit(512 * MIB, "cpu"):
        _filled(256)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size"), memory_limit(64 * MIB, "cpu"):
        torch.ones(2) + torch.ones(3)


def test_saved_bytes():
    """A dense loss saves at least the relations of both models. A blocked loss saves little more than the gradient."""
    inputs = Workload(1, 2, 64, 8, 4).inputs()
    relation, gradient = 2 * 64 * 64 * 4, 64 * 2 * 4 * 4
    eager, blocked = (TimedLoss(PROVIDERS[name].build(inputs), [inputs]).saved_bytes() for name in ("eager", "torch"))
    assert 2 * relation <= eager <= 4 * relation
    assert gradient <= blocked <= gradient + 64


def _limited():
    with memory_limit(64 * MIB, "cpu"):
        return _filled(256).sum().item()


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


def _slow():
    signal.pause()


def test_isolated_work_answers_fails_dies_and_is_stopped():
    assert isolated(sum, [1, 2, 3]) == 6
    with pytest.raises(OutOfMemory, match="allocate"):
        isolated(_limited)
    with pytest.raises(OutOfMemory, match="SIGKILL"):
        isolated(_killed)
    with pytest.raises(ZeroDivisionError):
        isolated(divmod, 1, 0)
    with pytest.raises(TimeoutError):
        isolated(_slow, seconds=0.2)


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 64, 99, 100])
@pytest.mark.parametrize("guess", [0, 1, 5, 64, 100, 1000])
def test_largest(answer, guess):
    tried = []

    def fits(n):
        assert 1 <= n <= 100
        assert n not in tried
        tried.append(n)
        return n <= answer

    assert largest(fits, guess, 100) == answer
    assert len(tried) <= 2 + 2 * 7


def _freed_mib():
    """Memory that freed tensors and small blocks return in three uses of the manager, in MiB."""
    returned = []
    for _ in range(3):
        with freed_memory_returned():
            pieces = [_filled(12) for _ in range(4)]
            kept = _filled(1)
            held = process_bytes("VmRSS")
            del pieces
            returned.append((held - process_bytes("VmRSS")) / MIB)
            blocks = [b"x" * (100 * 1024) + bytes([i % 256]) for i in range(480)]  # below the size that is mapped
            held = process_bytes("VmRSS")
            del blocks
            returned.append((held - process_bytes("VmRSS")) / MIB)
        assert kept.sum() == MIB // 4
    return returned


def test_freed_memory_is_returned():
    """Freed blocks return to the system, even if glibc would keep them in the heap below a block that is in use."""
    assert min(isolated(_freed_mib)) >= 44
