"""The processes of a run: one, or those of torchrun (gloo on CPU, nccl on CUDA), and what they agree on."""

from __future__ import annotations

import ctypes
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


class Processes:
    """This process's rank, device and collectives; used as a context, it starts and ends the process group."""

    def __init__(self, device: str) -> None:
        """
        Args:
            device: "auto", "cpu" or "cuda".

        Raises:
            RuntimeError: "cuda" where there is none.
            ValueError: WORLD_SIZE, RANK or LOCAL_RANK of the environment do not fit.
        """
        self.count, self.rank = _from_environment("WORLD_SIZE", 1), _from_environment("RANK", 0)
        self.local_rank = _from_environment("LOCAL_RANK", 0)
        if not 0 <= self.rank < self.count:
            raise ValueError(
                f"environment: RANK is {self.rank} and WORLD_SIZE {self.count}, expected 0 <= RANK < WORLD_SIZE"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if device != "cpu" and torch.cuda.is_available():
            if not 0 <= self.local_rank < torch.cuda.device_count():
                raise ValueError(
                    f"environment: LOCAL_RANK is {self.local_rank}, but there are {torch.cuda.device_count()} CUDA "
                    "devices; start at most one process a device, or use --device cpu"
                )
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        self._started = False
        self._control: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def __enter__(self) -> Processes:
        _end_with_torchrun()
        if self.count > 1:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
                self._started = True
            # Flags and RNG states travel on the CPU, so that they never wait for the device.
            self._control = dist.new_group(backend="gloo")
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on the device over the processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.count == 1:
            return value
        flag = torch.tensor(value)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control)
        return int(flag)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A CPU tensor of every process, in the order of ranks."""
        if self.count == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self._control)
        return parts

    def gather_values(self, value: Any) -> list[Any]:
        """A small value of every process, in the order of ranks."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._control)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """Runs `action` on the main process and gives its (small) result to all; where it fails, every process fails.

        `action` must not communicate.
        """
        if self.count == 1:
            return action()
        error: Exception | None = None
        reply: list[Any] = [False, None]
        if self.main:
            try:
                reply = [True, action()]
            except Exception as failure:
                error = failure
        dist.broadcast_object_list(reply, src=0, group=self._control)
        if error is not None:
            raise error
        done, result = reply
        if not done:
            raise RuntimeError("the main process failed; its message says why")
        return result

    def together(self, action: Callable[[], T]) -> T:
        """Runs `action` on every process; where it fails on one, every process fails, and none waits for another.

        `action` must not communicate.

        Raises:
            Exception: what `action` raised here.
            RuntimeError: it succeeded here and failed on another process; the message names process and error.
        """
        if self.count == 1:
            return action()
        error: Exception | None = None
        result: Any = None
        try:
            result = action()
        except Exception as failure:
            error = failure
        if self.largest(int(error is not None)):
            errors = self.gather_values(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            rank = next(rank for rank, text in enumerate(errors) if text is not None)
            raise RuntimeError(f"process {rank} failed: {errors[rank]}")
        return result

    def agree(self, value: Any, what: str) -> None:
        """Raises `RuntimeError` on every process if their values differ; `None` agrees with all."""
        values = self.gather_values(value)
        known = [value for value in values if value is not None]
        if any(value != known[0] for value in known):
            listed = "; ".join(f"process {rank}: {value}" for rank, value in enumerate(values))
            raise RuntimeError(f"the processes do not agree on {what}: {listed}")


def _from_environment(name: str, default: int) -> int:
    """A launcher's number; an empty variable counts as missing."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(f"environment: {name} is {text!r}, expected a whole number") from None


def _end_with_torchrun() -> None:
    """Asks Linux for a SIGTERM when torchrun dies: a killed launcher cannot end its workers itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform.startswith("linux"):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died in between
            os.kill(os.getpid(), signal.SIGTERM)
