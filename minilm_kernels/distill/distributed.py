"""`DistContext`: rank, device and collectives of a run, alone or under torchrun (gloo on CPU, NCCL on CUDA)."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1


class DistContext:
    """Rank, device and collectives of this process. The context manager creates and destroys the process group.

    Args:
        device: "auto", "cpu" or "cuda".

    Attributes:
        world_size: number of processes.
        rank, local_rank: number of this process, among all processes and among those of its machine.
        device: device of this process.

    Raises:
        RuntimeError: "cuda" without a CUDA device.
        ValueError: the environment variables WORLD_SIZE, RANK and LOCAL_RANK are inconsistent.
    """

    def __init__(self, device: str) -> None:
        self.world_size, self.rank = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
        self.local_rank = _from_environment("LOCAL_RANK", 0)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"environment: RANK is {self.rank} and WORLD_SIZE {self.world_size}, expected 0 <= RANK < WORLD_SIZE"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device cuda: torch finds no CUDA device; use --device cpu")
        if device != "cpu" and torch.cuda.is_available():
            if not 0 <= self.local_rank < torch.cuda.device_count():
                raise ValueError(
                    f"environment: LOCAL_RANK is {self.local_rank}, but there are {torch.cuda.device_count()} CUDA "
                    "devices; start at most one process per device, or use --device cpu"
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        self._started = False
        self._control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files."""
        return self.rank == 0

    def __enter__(self) -> DistContext:
        _end_with_torchrun()
        if self.world_size > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                self._started = True
            # Flags are exchanged on the CPU, so that they never wait for the device.
            try:
                self._control = dist.new_group(backend="gloo")
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.world_size > 1:
            gc.collect()  # a process that ends with a group may abort; sharded models hold theirs until then
        if self._started:
            dist.destroy_process_group()
        elif self._control is not None:
            dist.destroy_process_group(self._control)
        self._control = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on the device over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The maximum of `value` over all processes."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control)
        return int(flag)

    def gather_objects(self, value: Any) -> list[Any]:
        """The (small) values of all processes, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on the main process and returns its (small) result on all processes.

        `action` must not communicate.

        Raises:
            Exception: on the main process, the exception of `action`.
            RuntimeError: on the other processes, if `action` failed.
        """
        if self.world_size == 1:
            return action()
        error: Exception | None = None
        reply: list[Any] = [False, None]
        if self.is_main:
            try:
                reply = [True, action()]
            except Exception as failure:
                error = failure
        dist.broadcast_object_list(reply, src=0, group=self._control)
        if error is not None:
            raise error
        done, result = reply
        if not done:
            raise RuntimeError("the main process failed; see its error message")
        return result

    def on_all(self, action: Callable[[], T]) -> T:
        """Runs `action` on every process. If it fails on one process, all of them raise, and none waits for another.

        `action` must not communicate.

        Raises:
            Exception: the exception of `action` on this process.
            RuntimeError: `action` succeeded here and failed on another process, which the message names.
        """
        if self.world_size == 1:
            return action()
        error: Exception | None = None
        result: Any = None
        try:
            result = action()
        except Exception as failure:
            error = failure
        if self.max(int(error is not None)):
            errors = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank = next(rank for rank, text in enumerate(errors) if text is not None)
            raise RuntimeError(f"process {rank} failed: {errors[rank]}")
        return result

    def check_equal(self, value: Any, what: str) -> None:
        """Raises `RuntimeError` on every process if their values differ. `None` counts as equal to every value."""
        values = self.gather_objects(value)
        known = [value for value in values if value is not None]
        if any(value != known[0] for value in known):
            listed = "; ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
            raise RuntimeError(f"the processes do not agree on {what}: {listed}")


def _from_environment(name: str, default: int) -> int:
    """An integer that the launcher has set; an empty variable counts as missing."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"environment: {name} is {text!r}, expected a whole number") from None


def _end_with_torchrun() -> None:
    """Ends the process when torchrun dies."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """Asks Linux for a SIGTERM when the parent dies, because a killed process cannot end those that it has started.

    Args:
        parent: number of the parent process.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # the parent died before the call
            os.kill(os.getpid(), signal.SIGTERM)
