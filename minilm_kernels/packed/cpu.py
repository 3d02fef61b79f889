"""The CPU operator: PyTorch's fused attention kernel, a document a call, into one buffer.

Windows, and dropout, which the kernel lacks, go through blocks of queries. One call for documents of equal length was
measured, too: the copies of its operands cost more than the calls, except for documents of 8 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_WINDOW_BLOCK = 64  # fewest queries of a block under a window
_DROPOUT_BLOCK = 256  # most queries of a block with dropout


class _Block(NamedTuple):
    """Queries and the keys that they may see, as slices of the row.

    Attributes:
        causal: True if a query sees the keys up to its own position; both slices are then equal.
        seen: otherwise, the visible pairs, (queries, keys) bool; None for all.
    """

    queries: slice
    keys: slice
    causal: bool
    seen: Tensor | None


def _blocks(borders: list[int], causal: bool, window: int, dropout: float) -> Iterator[_Block]:
    for start, end in pairwise(borders):
        length = end - start
        narrow = 0 <= window < length - 1
        if not (narrow or dropout):
            if length:
                yield _Block(slice(start, end), slice(start, end), causal, None)
            continue
        step = max(window, _WINDOW_BLOCK) if narrow else length
        step = min(step, _DROPOUT_BLOCK) if dropout else step
        for i in range(start, end, max(step, 1)):
            j = min(i + step, end)
            first, last = (max(start, i - window), min(end, j + window)) if narrow else (start, end)
            last = min(last, j) if causal else last
            distance = torch.arange(i, j)[:, None] - torch.arange(first, last)
            seen = distance.abs() <= window if narrow else None
            if causal:
                seen = distance >= 0 if seen is None else seen & (distance >= 0)
            yield _Block(slice(i, j), slice(first, last), False, seen)


def _with_dense_heads(x: Tensor) -> Tensor:
    """The kernel reads the numbers of a head as neighbours, and does not check that they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _split(x: Tensor, part: slice, groups: int) -> Tensor:
    """(T, heads, width) to (groups, key heads, L, width); the query heads of a key head are neighbours."""
    return x[part].unflatten(1, (-1, groups)).permute(2, 1, 0, 3)


def _shared(x: Tensor, part: slice, groups: int) -> Tensor:
    """(T, key heads, width) to (groups, key heads, L, width), without a copy."""
    return x[part].transpose(0, 1)[None].expand(groups, -1, -1, -1)


def _bias(seen: Tensor | None, like: Tensor) -> Tensor | None:
    return None if seen is None else like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _checked(cu_seqlens: Tensor, tokens: int, longest: int) -> list[int]:
    borders = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(borders)]
    if borders[0] != 0 or borders[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens: expected numbers that rise from 0 to the {tokens} tokens, got {borders}")
    if max(lengths) > longest:
        raise ValueError(f"max_seqlen={longest}: the longest document has {max(lengths)} tokens")
    return borders


@torch.library.custom_op("minilm_kernels::packed_attention", mutates_args=(), device_types="cpu")
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Output, (T, heads, width), and log-sum-exp of the scores, (T, heads). `window` is -1 without one."""
    query, key, value = map(_with_dense_heads, (query, key, value))
    groups = query.shape[1] // key.shape[1]
    chance = None if seed is None else torch.Generator().manual_seed(int(seed))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=_statistics_dtype(query))
    for rows, keys, in_order, seen in _blocks(_checked(cu_seqlens, len(query), max_seqlen), causal, window, dropout):
        q, k, v = _split(query, rows, groups), _shared(key, keys, groups), _shared(value, keys, groups)
        if chance is None:
            out, sums = _FORWARD(q, k, v, 0.0, in_order, attn_mask=_bias(seen, q), scale=scale)
        else:
            scores = _scores(q, k, scale, seen)
            sums = scores.logsumexp(-1)
            p = scores.sub_(sums[..., None]).exp_()
            out = p.mul_(_kept(p, dropout, chance)) @ v.to(p.dtype) / (1 - dropout)
        _split(output, rows, groups).copy_(out)
        _split(lse[..., None], rows, groups).copy_(sums[..., None])
    return output, lse


@attend.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=_statistics_dtype(query))


@torch.library.custom_op("minilm_kernels::packed_attention_backward", mutates_args=(), device_types="cpu")
def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. The blocks come in the order of the forward, and so do random numbers."""
    query, key, value = map(_with_dense_heads, (query, key, value))
    groups = query.shape[1] // key.shape[1]
    chance = None if seed is None else torch.Generator().manual_seed(int(seed))
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    for rows, keys, in_order, seen in _blocks(_checked(cu_seqlens, len(query), max_seqlen), causal, window, dropout):
        q, k, v = _split(query, rows, groups), _shared(key, keys, groups), _shared(value, keys, groups)
        grad, out = _split(gradient, rows, groups), _split(output, rows, groups)
        sums = _split(lse[..., None], rows, groups)[..., 0]
        if chance is None:
            sums = sums.transpose(1, 2).contiguous().transpose(1, 2)  # the strides that the kernel expects
            parts = _BACKWARD(grad, q, k, v, out, sums, 0.0, in_order, attn_mask=_bias(seen, q), scale=scale)
        else:
            p = _scores(q, k, scale, seen).sub_(sums[..., None]).exp_()
            kept = _kept(p, dropout, chance)
            q, k, v, grad, out = (x.to(p.dtype) for x in (q, k, v, grad, out))
            inner = (grad * out).sum(-1, keepdim=True)  # the sum of p * dp over the keys
            grad = grad / (1 - dropout)
            ds = (grad @ v.mT).mul_(kept).sub_(inner).mul_(p)
            parts = ds @ (k * scale), ds.mT @ (q * scale), p.mul_(kept).mT @ grad
        _split(grads[0], rows, groups).copy_(parts[0])
        for whole, part in zip(grads[1:], parts[1:], strict=True):
            whole[keys].transpose(0, 1).add_(part[0] if groups == 1 else part.sum(0))
    return grads[0], grads[1], grads[2]


@attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.max_seqlen, ctx.scale, ctx.causal, ctx.window, ctx.dropout = inputs
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple:
    options = (ctx.max_seqlen, ctx.scale, ctx.causal, ctx.window, ctx.dropout)
    return *attend_backward(gradient.contiguous(), *ctx.saved_tensors, *options), *(None,) * 7


attend.register_autograd(_backward, setup_context=_setup_context)


def _statistics_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _scores(query: Tensor, key: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Scaled products in float32 or float64; masked pairs have -inf."""
    dtype = _statistics_dtype(query)
    scores = (query.to(dtype) * scale) @ key.to(dtype).mT
    return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)


def _kept(p: Tensor, dropout: float, chance: torch.Generator) -> Tensor:
    """1 for probabilities that are kept, 0 for others."""
    return torch.empty_like(p).bernoulli_(1 - dropout, generator=chance)
