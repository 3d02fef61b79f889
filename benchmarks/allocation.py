"""Memory: what a step takes at its peak, limits that protect the machine, and the largest batch that fits."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt


class OutOfMemory(Exception):
    """More than was allowed, or more than there is."""


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Most memory that one run of `step` holds at once beyond what was held before; run it once before.

    CUDA: of PyTorch's allocator. CPU: of PyTorch's allocator, or the rise of the process's resident memory if that is
    more, since a kernel's own buffers do not pass through the allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with nothing_left_behind():  # only then does the resident memory follow what is held
        return max(_allocated_peak(step), _resident_rise(step))


def _allocated_peak(step: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _resident_rise(step: Callable[[], Any]) -> int:
    try:
        _CLEAR.write_text("5", encoding="ascii")  # the peak begins here
        before = process_bytes("VmRSS")
        step()
        return process_bytes("VmHWM") - before
    except OSError:  # not Linux
        return 0


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Within, blocks above 128 KiB are mapped, and go back to the system when they are freed (C library of GNU).

    Otherwise what was freed stays in the heap, and lends later blocks pages that a process of their own would have to
    ask the system for: a provider's time would depend on what ran before it. Not to be nested. An allocator that
    variables MALLOC_… of the environment set up stays as it is.
    """
    c = ctypes.CDLL(None)
    ours = hasattr(c, "mallopt") and hasattr(c, "malloc_trim")
    ours = ours and not any(name.startswith("MALLOC_") for name in os.environ)
    if ours:
        c.mallopt(_MMAP_THRESHOLD, 2**17)
        c.malloc_trim(0)
    try:
        yield
    finally:
        if ours:
            c.mallopt(_MMAP_THRESHOLD, 2**25)  # where it comes to lie by itself
            c.mallopt(_TRIM_THRESHOLD, 2**26)
            c.malloc_trim(0)


def process_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def at_most(extra: int | None, device: str) -> Iterator[None]:
    """Within, allocations beyond `extra` bytes fail; they, and CUDA's own, become OutOfMemory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limited = device == "cpu" and extra is not None and _STATUS.exists()
    if limited:
        resource.setrlimit(resource.RLIMIT_DATA, (process_bytes("VmData") + (extra or 0), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise OutOfMemory(str(error).strip().splitlines()[0] if str(error) else "std::bad_alloc") from error
        raise
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def isolated(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """`function(*arguments)` in a process of its own, so that not even a crash for want of memory reaches this one.

    Raises what the function raises, OutOfMemory if the process was killed or crashed, TimeoutError after `seconds`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.candidates", "torch.profiler"])  # seconds, once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, torch.get_num_threads(), function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"not done after {seconds:.0f} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise OutOfMemory(f"its process ended with {name}") from None
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return result


def _call(sender: Any, threads: int, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(threads)
    try:
        answer = function(*arguments), None
    except Exception as error:
        sender.send((None, error))
    else:
        sender.send(answer)


def largest(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number from 0 to `most` that fits, where all below one that fits do: outwards from a guess, then
    bisection."""
    low, high = 0, most + 1  # low fits, high does not
    trial, step = min(max(guess, 1), most), 1
    while high - low > 1:
        if fits(trial):
            low = trial
        else:
            high = trial
        if high > most:
            trial = min(low + step, most)
        elif low == 0:
            trial = max(high - step, 1)
        else:
            trial = (low + high) // 2
        step *= 2
    return low
