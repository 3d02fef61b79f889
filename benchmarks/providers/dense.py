"""Baselines that store all scores: plain PyTorch, PyTorch a few heads at a time, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from benchmarks.measure.workload import Heads, Inputs, Loss

from .provider import DenseMask, Unsupported

_CHUNK_HEADS = 4  # heads per chunk of `chunked`; fewer heads take less memory and more kernel launches


def row_kl(
    q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor, *, masked: Tensor | None = None, fp32: bool = False
) -> Tensor:
    """KL of each query row of (..., S, D) heads; `fp32` computes softmax and KL of half-precision scores in float32."""
    log_t, log_s = _log_softmax(q_t, k_t, masked, fp32), _log_softmax(q_s, k_s, masked, fp32)
    difference = log_t - log_s
    if masked is not None:
        difference = difference.masked_fill(masked, 0.0)  # instead of −inf − −inf
    return (log_t.exp() * difference).sum(-1)


def _log_softmax(query: Tensor, key: Tensor, masked: Tensor | None, fp32: bool) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if fp32:
        scores = scores.float()
    if masked is not None:
        scores = scores.masked_fill(masked, -torch.inf)
    return scores.log_softmax(-1)


def relation_sum(inputs: Inputs, mask: DenseMask, relation: Callable[..., Tensor], width: int = 0) -> Loss:
    """The sum of `relation(q_t, k_t, q_s, k_s)` over the relations, for (B, A, S, D) heads.

    Narrower heads than `width` get zeros for the missing features.
    """

    def prepare(x: Tensor) -> Tensor:
        x = mask.padded(x)
        return x if x.shape[-1] >= width else pad(x, (0, width - x.shape[-1]))

    def loss(teacher: Heads, student: Heads) -> Tensor:
        prepared = [{name: prepare(x) for name, x in heads.items()} for heads in (teacher, student)]
        return torch.stack(
            [relation(*(heads[name] for heads in prepared for name in names)) for names in inputs.relations]
        ).sum()

    return loss


def eager(inputs: Inputs, fp32: bool = False) -> Loss:
    """The loss as public MiniLMv2 code computes it, with its mistakes corrected."""
    mask = DenseMask.of(inputs)
    return relation_sum(
        inputs, mask, lambda *heads: (row_kl(*heads, masked=mask.masked, fp32=fp32) * mask.weights).sum()
    )


def eager_fp32_softmax(inputs: Inputs) -> Loss:
    if inputs.example.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported("without half precision this is the same as eager")
    return eager(inputs, fp32=True)


def chunked(inputs: Inputs) -> Loss:
    mask = DenseMask.of(inputs)

    def chunk(*heads: Tensor) -> Tensor:
        return (row_kl(*heads, masked=mask.masked) * mask.weights).sum()

    recomputed = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)

    def relation(*heads: Tensor) -> Tensor:
        chunks = zip(*(x.split(_CHUNK_HEADS, 1) for x in heads), strict=True)
        return torch.stack([recomputed(*part) for part in chunks]).sum()

    return relation_sum(inputs, mask, relation)


def compiled(inputs: Inputs) -> Loss:
    torch._dynamo.reset()
    return torch.compile(eager(inputs), dynamic=False)
