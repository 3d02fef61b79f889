"""The providers, each of which computes the same loss in a different way.

The loss is the sum of relation KL over the relations, averaged over the heads and valid query rows of each sequence and
then over the sequences (reduction "sequence"); it is differentiable in the student's heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.measure.workload import Heads, Inputs, Loss
from minilm_kernels import backend_status
from minilm_kernels.relation import relation_kl_multi

from . import attention, dense, third_party
from .provider import Provider, Unsupported

__all__ = ["BACKENDS", "PROVIDERS", "Provider", "Unsupported"]

BACKENDS = [name for name in backend_status() if name != "reference"]
"""The backends of this package, without `reference`."""

# Exponentials of loss and gradient per ordered pair, as counted in docs/mathematics.md and docs/cpu.md. `torch`
# computes two softmaxes per pair. Kernels that visit each unordered pair in two phases also compute two per pair.
_EXPONENTIALS = {"torch": 2, "cpu": 2, "triton": 4, "cuda": 2}


def _backend(name: Any, inputs: Inputs) -> Loss:
    reason = backend_status()[name]
    if reason != "ready":
        raise Unsupported(reason)

    def loss(teacher: Heads, student: Heads) -> Tensor:
        return relation_kl_multi(teacher, student, inputs.relations, backend=name, **inputs.mask).sum()

    return loss


PROVIDERS = {
    "eager": Provider(dense.eager, "dense PyTorch, the semantics of public MiniLMv2 code", dense=True, exponentials=4),
    "eager-fp32-softmax": Provider(dense.eager_fp32_softmax, "eager, half-precision scores in float32", dense=True),
    "chunked": Provider(dense.chunked, "eager, four heads at a time, recomputed in the backward", dense=True),
    "torch.compile": Provider(dense.compiled, "torch.compile of eager", dense=True),
    "sdpa": Provider(attention.sdpa, "composed from PyTorch's fused attention kernels"),
    "flex": Provider(attention.flex, "composed from compiled FlexAttention"),
    "bertdistiller": Provider(third_party.bertdistiller, "the loss of the package bertdistiller", dense=True),
    "liger-kernel": Provider(third_party.liger, "dense scores, KL of the package liger-kernel", dense=True),
    **{n: Provider(partial(_backend, n), "this package", exponentials=_EXPONENTIALS.get(n)) for n in BACKENDS},
}
