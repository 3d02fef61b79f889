"""Processes of tests: two or more that compute together over gloo, distillation runs, and the descendants of one."""

import contextlib
import gc
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from minilm_kernels.distill.metrics import read_metrics

PATIENCE = 600.0  # seconds that anything may take on a busy machine


def end_process() -> None:
    """Leaves the process group and ends the process, without Python's shutdown, in which a group can hang or abort."""
    gc.collect()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def _worker(rank: int, work: Callable[[int, str], None], folder: str, processes: int) -> None:
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
        work(rank, folder)
        end_process()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_two(work: Callable[[int, str], None], folder: Path, processes: int = 2) -> None:
    """Runs `work(rank, folder)` in two (or more) processes of one group."""
    workers = torch.multiprocessing.spawn(_worker, (work, str(folder), processes), nprocs=processes, join=False)
    deadline = time.monotonic() + PATIENCE
    try:
        while not workers.join(timeout=5):
            assert time.monotonic() < deadline, "the workers do not end"
    finally:
        for process in workers.processes:
            process.kill()


def wait_for_step(metrics: Path, step: int, *processes: subprocess.Popen[str]) -> None:
    """Waits until a run in processes has written the metrics of `step`."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended = [process for process in processes if process.poll() is not None]  # their metrics are whole
        if any(record["step"] >= step for record in read_metrics(metrics)):
            return
        assert not ended, [process.communicate(timeout=PATIENCE)[0] for process in ended]
        assert time.monotonic() < deadline, "the run does not advance"
        time.sleep(0.005)


def children(parent: int) -> list[int]:
    """The descendants of a process, from /proc."""
    with contextlib.suppress(OSError):
        below = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        return [*below, *(deeper for child in below for deeper in children(child))]
    return []
