"""The processes of a run: one, or those of torchrun (gloo on CPU, nccl on CUDA), and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This process's rank, device and collectives; used as a context, it starts and ends the process group."""

    def __init__(self, device: str) -> None:
        """
        Args:
            device: "auto", "cpu" or "cuda". Raises `RuntimeError` for "cuda" where there is none.
        """
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if device != "cpu" and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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

    def on_main(self, action: Callable[[], None]) -> None:
        """Runs `action` on the main process; where it fails, every process fails."""
        error: Exception | None = None
        if self.main:
            try:
                action()
            except Exception as failure:
                error = failure
        failed = self.largest(int(error is not None))
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("the main process failed; its message says why")
