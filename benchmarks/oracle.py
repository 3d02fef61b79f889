"""What everyone is held to: the loss and its gradients by the dense definition in float64, a block of rows at a time.

It shares no code with the package: a mistake there cannot hide here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .providers.support import DenseMask
from .workloads import Inputs

# A step further from float64 than this computes another loss: it gets no speed. Half precision rounds harder.
WRONG = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}

# Pairs that are checked at most: a few seconds on two cores, and on a GPU (estimates). Beyond, the first sequences are.
_MOST_PAIRS = {"cpu": 10**8, "cuda": 2 * 10**10}
_BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**26}  # of one relation matrix: 32 and 512 MiB


class Oracle:
    """The loss and its gradients of as many sequences as can be afforded."""

    def __init__(self, inputs: Inputs, pairs: int, device: str) -> None:
        share = min(1.0, _MOST_PAIRS[device] / max(1, pairs))
        self.sequences = max(1, int(inputs.sequences * share))
        self.part = inputs if self.sequences == inputs.sequences else inputs.first(self.sequences)
        self._share = self.sequences / inputs.sequences  # of N sequences, each weighs 1/N in a gradient of the whole
        self.value, self.grads = loss_and_gradients(self.part, _BLOCK_SCORES[device])

    def errors(self, value: Tensor, grads: Sequence[Tensor]) -> tuple[float, float | None]:
        """Relative errors of a value of the part, and of gradients of the part or of the whole, if there are any."""
        share = 1.0 if len(grads) and grads[0].shape == self.grads[0].shape else self._share
        worst = [relative(g[: len(e)], e * share) for g, e in zip(grads, self.grads, strict=bool(len(grads)))]
        return relative(value, self.value), max(worst) if worst else None

    def fault(self, dtype: str, value: Tensor, grads: Sequence[Tensor]) -> tuple[dict, str | None]:
        """The keys of a row, and why this is another loss, if it is."""
        error_value, error_grad = self.errors(value, grads)
        worst = max(error_value, error_grad or 0.0)
        right = worst < WRONG[dtype]  # NaN is not
        reason = None if right else f"relative error {worst:.1e}, allowed {WRONG[dtype]:.0e}"
        return {"error_value": error_value, "error_grad": error_grad}, reason


def loss_and_gradients(inputs: Inputs, block_scores: int) -> tuple[Tensor, list[Tensor]]:
    mask = DenseMask.of(inputs)
    grads = {name: torch.zeros(x.shape, dtype=torch.float64, device=x.device) for name, x in inputs.student.items()}
    total = torch.zeros((), dtype=torch.float64, device=mask.weights.device)
    real = (mask.weights > 0).double()
    count, _, size = real.shape
    for b, weights in enumerate(real / (inputs.heads * count * real.sum(-1, keepdim=True))):  # (1, S)
        place: Tensor | int = b if mask.tokens is None else mask.tokens[b, : int((weights[0] > 0).sum())]
        sides = [
            {name: x[place].transpose(0, 1).double().detach() for name, x in side.items()}  # (A, S, D)
            for side in (inputs.teacher, inputs.student)
        ]
        student = {name: x.requires_grad_() for name, x in sides[1].items()}
        length = next(iter(student.values())).shape[1]
        hidden = torch.zeros((), dtype=torch.bool, device=weights.device) if mask.hidden is None else mask.hidden
        hidden = hidden.expand(count, 1, size, size)[b, 0, :length, :length]
        block = max(1, block_scores // (inputs.heads * length))
        for query, key in inputs.relations:
            for start in range(0, length, block):
                rows = slice(start, min(start + block, length))
                logs = [_log_relation(side[query][:, rows], side[key], hidden[rows]) for side in sides]
                difference = (logs[0] - logs[1]).masked_fill(hidden[rows], 0.0)  # from −inf − −inf
                value = ((logs[0].exp() * difference).sum(-1) * weights[:, rows]).sum()
                value.backward()
                total += value.detach()
        for name, x in student.items():
            if x.grad is not None:
                grads[name][place] += x.grad.transpose(0, 1)
    return total, list(grads.values())


def _log_relation(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).log_softmax(-1)


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm; absolute where the expected value is 0."""
    difference, norm = (got.double() - expected).norm().item(), expected.norm().item()
    return difference / norm if norm else difference
