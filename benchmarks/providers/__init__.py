"""Who is measured. A provider turns inputs into a loss: one function of the teacher's and the student's heads.

Every loss is the same number: the sum over the relations of relation KL, averaged over heads and real rows of each
sequence and then over the sequences (reduction "sequence"), differentiable in the student's heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from benchmarks.workloads import Inputs
from minilm_kernels import backend_status
from minilm_kernels.relation import relation_kl_multi

from . import attention, dense, peers
from .support import Loss, Unsupported

__all__ = ["PROVIDERS", "Loss", "Provider", "Unsupported", "backends"]


@dataclass(frozen=True)
class Provider:
    """How a loss is made for inputs of given shapes and masks (`build` may raise Unsupported), and what it is."""

    build: Callable[[Inputs], Loss]
    about: str
    dense: bool = False  # needs memory for every pair
    exponentials: int | None = None  # that loss and gradient take for an ordered pair of a self relation, if known


def _backend(name: str, inputs: Inputs) -> Loss:
    reason = backend_status()[name]
    if reason != "ready":
        raise Unsupported(reason)

    def loss(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> Tensor:
        return relation_kl_multi(teacher, student, inputs.relations, backend=name, **inputs.mask).sum()

    return loss


def backends() -> list[str]:
    """The package's own, without its specification."""
    return [name for name in backend_status() if name != "reference"]


# Of the package's kernels, as docs/mathematics.md and docs/cpu.md count them. `torch` takes two softmaxes a pair;
# unordered pairs, in both phases, make two an ordered pair.
_EXPONENTIALS = {"torch": 2, "cpu": 2, "triton": 4, "cuda": 2}

PROVIDERS: dict[str, Provider] = {
    "eager": Provider(dense.eager, "dense PyTorch, the semantics of public MiniLMv2 code", dense=True, exponentials=4),
    "eager-fp32-softmax": Provider(
        dense.eager_fp32_softmax, "the same, half-precision scores in float32 from there on", True
    ),
    "chunked": Provider(dense.chunked, "dense PyTorch, a few heads at a time, each recomputed in the backward", True),
    "torch.compile": Provider(dense.compiled, "torch.compile of the dense loss", True),
    "sdpa": Provider(attention.sdpa, "composed from PyTorch's fused attention kernels"),
    "flex": Provider(attention.flex, "composed from compiled FlexAttention"),
    "bertdistiller": Provider(peers.bertdistiller, "the loss of the package bertdistiller", True),
    "liger-kernel": Provider(peers.liger, "dense scores, KL by the package liger-kernel", True),
    **{
        name: Provider(partial(_backend, name), "this package", exponentials=_EXPONENTIALS.get(name))
        for name in backends()
    },
}
