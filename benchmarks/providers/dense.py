"""Baselines that hold every score in memory: plain PyTorch, some heads at a time, and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.workloads import Inputs

from .support import DenseMask, Loss, Unsupported

_CHUNK_HEADS = 4  # of `chunked`: a choice, memory falls with it and launches rise


def _relation(
    query_t: Tensor, key_t: Tensor, query_s: Tensor, key_s: Tensor, mask: DenseMask, wide: bool = False
) -> Tensor:
    """Weighted sum of the rows' KL; (B, A, S, D) each. `wide`: softmax and KL in float32."""
    log_t = _log_softmax(query_t, key_t, mask.hidden, wide)
    log_s = _log_softmax(query_s, key_s, mask.hidden, wide)
    difference = log_t - log_s
    if mask.hidden is not None:
        difference = difference.masked_fill(mask.hidden, 0.0)
    return ((log_t.exp() * difference).sum(-1) * mask.weights).sum()


def _log_softmax(query: Tensor, key: Tensor, hidden: Tensor | None, wide: bool) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if wide:
        scores = scores.float()
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.log_softmax(-1)


def _loss(inputs: Inputs, relation) -> Loss:
    mask = DenseMask.of(inputs)

    def loss(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> Tensor:
        sides = [{name: mask.padded(x) for name, x in side.items()} for side in (teacher, student)]
        return torch.stack(
            [relation(*(side[name] for side in sides for name in names), mask) for names in inputs.relations]
        ).sum()

    return loss


def eager(inputs: Inputs) -> Loss:
    """As public MiniLMv2 code computes it, with its mistakes repaired."""
    return _loss(inputs, _relation)


def eager_fp32_softmax(inputs: Inputs) -> Loss:
    if next(iter(inputs.student.values())).dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported("the inputs are not in half precision: the same as eager")
    return _loss(inputs, partial(_relation, wide=True))


def chunked(inputs: Inputs) -> Loss:
    def relation(*arguments) -> Tensor:
        *tensors, mask = arguments
        chunks = zip(*(x.split(_CHUNK_HEADS, 1) for x in tensors), strict=True)
        parts = [checkpoint(_relation, *c, mask, use_reentrant=False, preserve_rng_state=False) for c in chunks]
        return torch.stack(parts).sum()

    return _loss(inputs, relation)


def compiled(inputs: Inputs) -> Loss:
    torch._dynamo.reset()
    return torch.compile(eager(inputs), dynamic=False)
