"""Memory: the peak of a run, limits that protect the machine, and the largest batch that fits."""

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
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt


class OutOfMemory(Exception):
    """A run needs more memory than the limit allows or the machine has."""


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Peak memory of a call of `run` beyond the memory in use before the call; call `run` once before, as a warm-up.

    On CUDA this is the peak of PyTorch's allocator. On a CPU it is that peak or the rise of the process's resident
    memory, whichever is larger, because buffers of native kernels do not pass through the allocator.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with freed_memory_returned():  # so that the resident memory is the memory in use
        return max(_allocated_peak(run), _resident_rise(run))


def _allocated_peak(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _resident_rise(run: Callable[[], Any]) -> int:
    rises = [0]
    # A rise is hidden if memory of another purpose is returned meanwhile: the kernel takes pages of files, such as
    # unused code, and other threads free theirs. This is rare, so one of three runs shows all of it.
    for _ in range(3):
        try:
            _CLEAR.write_text("5", encoding="ascii")  # resets the peak
        except OSError:  # not Linux
            return 0
        before = process_bytes("VmRSS")
        run()
        rises.append(process_bytes("VmHWM") - before)
    return max(rises)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Make glibc map blocks above 128 KiB and return them to the system when they are freed. Do not nest this manager.

    Otherwise freed blocks would stay in the heap, and a later provider would reuse their pages instead of requesting
    its own: its time would depend on the providers before it. If the environment configures the allocator by a
    variable MALLOC_..., nothing is changed.
    """
    c = ctypes.CDLL(None)
    configurable = hasattr(c, "mallopt") and hasattr(c, "malloc_trim")
    configurable = configurable and not any(name.startswith("MALLOC_") for name in os.environ)
    if configurable:
        c.mallopt(_MMAP_THRESHOLD, 2**17)
        c.mallopt(_TRIM_THRESHOLD, 2**17)
        c.malloc_trim(0)
    try:
        yield
    finally:
        if configurable:
            c.mallopt(_MMAP_THRESHOLD, 2**25)  # the largest values that glibc itself sets
            c.mallopt(_TRIM_THRESHOLD, 2**26)
            c.malloc_trim(0)


def process_bytes(name: str) -> int:
    """A field of /proc/self/status, such as VmRSS."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


@contextmanager
def memory_limit(extra: int | None, device: str) -> Iterator[None]:
    """Limit memory to `extra` bytes beyond the memory in use. Allocations above the limit raise OutOfMemory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limited = device == "cpu" and extra is not None and _STATUS.exists()
    if limited:
        resource.setrlimit(resource.RLIMIT_DATA, (process_bytes("VmData") + (extra or 0), hard))
    if device == "cuda" and extra is not None:
        torch.cuda.empty_cache()
        share = (torch.cuda.memory_allocated() + extra) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise OutOfMemory(str(error).strip().splitlines()[0] if str(error) else "std::bad_alloc") from error
        raise
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        if device == "cuda" and extra is not None:
            torch.cuda.set_per_process_memory_fraction(1.0)


def isolated(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """Call `function` in a new process, so that a crash for lack of memory does not reach this one.

    Raises what the function raises, OutOfMemory if the process was killed or crashed, TimeoutError after `seconds`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure.correctness", "torch.profiler"])  # imported once, not each time
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, torch.get_num_threads(), function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise TimeoutError(f"not finished after {seconds:.0f} s")
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
        sender.send((function(*arguments), None))
    except Exception as error:
        sender.send((None, error))


def largest(fits: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest number in 0..most that fits, if all smaller ones fit: outwards from a guess, then by bisection."""
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
