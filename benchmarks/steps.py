"""One step of a provider in one mode: what is timed, and what it keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from .providers import Loss
from .workloads import Inputs

MODES = ("forward", "backward", "full")
"""forward: the loss without gradient, as in evaluation; full: loss and gradient; backward: full without its forward."""


class Step:
    """Runs a loss over copies of its inputs in turn, so that none is in the cache when its turn comes."""

    def __init__(self, loss: Loss, copies: Sequence[Inputs], mode: str) -> None:
        self.loss, self.mode = loss, mode
        self._copies: Iterator[Inputs] = cycle(copies)

    def prepare(self) -> Callable[[], tuple[Tensor, list[Tensor]]]:
        """What is not timed; returns what is."""
        inputs = next(self._copies)
        if self.mode == "forward":
            return lambda: self._forward(inputs)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.student.items()}

        def full() -> tuple[Tensor, list[Tensor]]:
            value = self.loss(inputs.teacher, leaves)
            return value.detach(), list(torch.autograd.grad(value, list(leaves.values())))

        if self.mode == "full":
            return full
        value = self.loss(inputs.teacher, leaves)
        return lambda: (value.detach(), list(torch.autograd.grad(value, list(leaves.values()))))

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        return self.prepare()()

    @torch.no_grad()
    def _forward(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        return self.loss(inputs.teacher, inputs.student), []

    def saved_bytes(self) -> int:
        """Bytes that the forward keeps for the backward, beside the inputs; 0 in mode "forward"."""
        if self.mode == "forward":
            return 0
        inputs = next(self._copies)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.student.items()}
        given = {x.untyped_storage().data_ptr() for side in (inputs.teacher, leaves) for x in side.values()}
        given |= {x.untyped_storage().data_ptr() for x in inputs.mask.values() if isinstance(x, Tensor)}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = self.loss(inputs.teacher, leaves)
        held = sum(kept.values())
        del value  # only now: a storage that was freed could have lent its address to another
        return held
