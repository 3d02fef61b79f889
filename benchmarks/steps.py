"""One step of a provider in one mode, and its error against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
from torch import Tensor

from minilm_kernels.relation import relations_kl

from .providers import Loss
from .workloads import Inputs

MODES = ("forward", "backward", "full")
"""forward: the loss without gradient, as in evaluation; full: loss and gradient; backward: full without its forward."""

# A step further from float64 than this computes another loss: it gets no speed. Half precision rounds harder.
WRONG = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}

# Pairs that the float64 oracle takes at most: about 10 s on two cores (6 ns a pair and core), and on a GPU seconds
# (estimate). Beyond, the first sequences alone are checked.
_ORACLE_PAIRS = {"cpu": 4 * 10**8, "cuda": 2 * 10**10}


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


class Oracle:
    """The loss and its gradients in float64, of as many sequences as can be afforded."""

    def __init__(self, inputs: Inputs, pairs: int, device: str) -> None:
        share = min(1.0, _ORACLE_PAIRS[device] / max(1, pairs))
        self.sequences = max(1, int(inputs.sequences * share))
        self.part = inputs if self.sequences == inputs.sequences else inputs.first(self.sequences)
        self._share = self.sequences / inputs.sequences  # of N sequences, each weighs 1/N in a gradient of the whole
        exact = self.part.double()
        leaves = {name: x.requires_grad_() for name, x in exact.student.items()}
        # The blocked backend, whose float64 the tests hold to the dense reference: no score matrix is needed.
        value = relations_kl(exact.teacher, leaves, exact.relations, backend="torch", **exact.mask).sum()
        self.value = value.detach()
        self.grads = torch.autograd.grad(value, list(leaves.values()))

    def errors(self, value: Tensor, grads: Sequence[Tensor]) -> tuple[float, float | None]:
        """Relative errors of a value of the part, and of gradients of the part or of the whole, if there are any."""
        share = 1.0 if len(grads) and grads[0].shape == self.grads[0].shape else self._share
        worst = [relative(g[: len(e)], e * share) for g, e in zip(grads, self.grads, strict=bool(len(grads)))]
        return relative(value, self.value), max(worst) if worst else None


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where the expected value is 0."""
    difference, norm = (got.double() - expected).norm().item(), expected.norm().item()
    return difference / norm if norm else difference
