"""One run of a provider's loss in one mode, of which time and memory are measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch import Tensor

from .workload import Heads, Inputs, Loss

Result = tuple[Tensor, list[Tensor]]

MODES = ("forward", "backward", "full")
"""forward: the loss without gradient, as in evaluation; full: loss and gradient; backward: full minus its forward."""


def leaves(inputs: Inputs) -> Heads:
    """The student's heads as tensors that require grad."""
    return {name: x.detach().requires_grad_() for name, x in inputs.student.items()}


def gradients(value: Tensor, student: Heads) -> Result:
    """The detached loss and its gradients."""
    return value.detach(), list(torch.autograd.grad(value, list(student.values())))


class TimedLoss:
    """Runs a loss on copies of its inputs in turn, so that a run never finds its inputs in the GPU's cache."""

    def __init__(self, loss: Loss, copies: Sequence[Inputs], mode: str = "full") -> None:
        self.loss, self.mode = loss, mode
        self._copies = cycle(copies)

    def prepare(self) -> Callable[[], Result]:
        """Do the untimed part of a run and return the timed part."""
        inputs = next(self._copies)
        if self.mode == "forward":
            return lambda: self._forward(inputs)
        student = leaves(inputs)
        if self.mode == "full":
            return lambda: gradients(self.loss(inputs.teacher, student), student)
        value = self.loss(inputs.teacher, student)
        return lambda: gradients(value, student)

    def __call__(self) -> Result:
        return self.prepare()()

    @torch.no_grad()
    def _forward(self, inputs: Inputs) -> Result:
        return self.loss(inputs.teacher, inputs.student), []

    def saved_bytes(self) -> int:
        """Bytes that the forward saves for the backward, without the inputs; 0 in mode "forward"."""
        if self.mode == "forward":
            return 0
        inputs = next(self._copies)
        student = leaves(inputs)
        given = [*inputs.teacher.values(), *student.values(), *inputs.mask.values()]
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = self.loss(inputs.teacher, student)
        total = sum(saved.values())
        del value  # kept until here, so that no address of a freed storage is used twice
        return total
