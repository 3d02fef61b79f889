"""Baselines composed from attention kernels. They store no score matrix, but visit every pair many times.

O_tt = attn(Q_t, K_t, V = K_t),  O_ts = attn(Q_t, K_t, V = K_s),  O_ss = attn(Q_s, K_s, V = K_s)
KL_i = scale_t q_t·O_tt − scale_s q_s·O_ts − lse_t + lse_s
dQ_s = scale_s g (O_ss − O_ts),   dK_s from the value gradients of two attention backwards with dO = g Q_s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure.workload import Inputs, Loss

from .dense import relation_sum
from .provider import DenseMask, Unsupported


class _Kernels(NamedTuple):
    """One attention implementation for (B, A, S, D) operands."""

    forward: Callable[..., tuple]  # q, k, v, scale= -> output, log-sum-exp and more that the backward needs
    value_grad: Callable[..., Tensor]  # gradient of the output, q, k, v, results of forward, scale= -> dV


def _kernels(x: Tensor, bias: Tensor | None, causal: bool) -> _Kernels:
    """CPU: PyTorch's fused kernel. CUDA: flash attention in half precision, memory-efficient attention otherwise."""
    aten = torch.ops.aten
    if not x.is_cuda:
        options = {"is_causal": causal, "attn_mask": bias}
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return _Kernels(
            partial(aten._scaled_dot_product_flash_attention_for_cpu, **options),
            lambda *args, scale: backward(*args, 0.0, **options, scale=scale)[2],
        )
    if x.dtype == torch.float32 or bias is not None:
        return _Kernels(
            lambda q, k, v, scale: aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, is_causal=causal, scale=scale
            ),
            lambda grad, q, k, v, *saved, scale: aten._scaled_dot_product_efficient_attention_backward(
                *(grad, q, k, v, bias, *saved, 0.0, [True, True, True, False], causal), scale=scale
            )[2],
        )
    return _Kernels(
        lambda q, k, v, scale: aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)[:8],
        lambda grad, *saved, scale: aten._scaled_dot_product_flash_attention_backward(
            *(grad, *saved[:-2], 0.0, causal, *saved[-2:]), scale=scale
        )[2],
    )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Dot product over the last axis, in float32, because KL is a small difference of such products."""
    return (x.float() * y.float()).sum(-1)


class _Relation(torch.autograd.Function):
    """Weighted KL of one relation, for (B, A, S, D) heads of one width; the forward computes the gradient."""

    @staticmethod
    def forward(ctx, kernels: _Kernels, weights, scales, q_t, k_t, q_s, k_s):
        scale_t, scale_s = scales
        o_tt, lse_t, *_ = kernels.forward(q_t, k_t, k_t, scale=scale_t)
        o_ts, *rest_t = kernels.forward(q_t, k_t, k_s, scale=scale_t)
        o_ss, lse_s, *rest_s = kernels.forward(q_s, k_s, k_s, scale=scale_s)
        length = q_t.shape[2]
        lse = lse_s[..., :length] - lse_t[..., :length]  # some kernels return more than `length` entries
        kl = scale_t * _dot(q_t, o_tt) - scale_s * _dot(q_s, o_ts)
        if any(ctx.needs_input_grad):
            g = weights[..., None]
            upstream = (g * q_s).to(q_s.dtype)
            query_grad = scale_s * g * (o_ss - o_ts)
            key_grad = scale_s * (
                kernels.value_grad(upstream, q_s, k_s, k_s, o_ss, lse_s, *rest_s, scale=scale_s)
                - kernels.value_grad(upstream, q_t, k_t, k_s, o_ts, *rest_t, scale=scale_t)
            )
            ctx.save_for_backward(query_grad.to(q_s.dtype), key_grad)
        return ((kl + lse) * weights).sum()

    @staticmethod
    def backward(ctx, grad):
        query_grad, key_grad = ((grad * x).to(x.dtype) for x in ctx.saved_tensors)
        return *[None] * 5, query_grad, key_grad


def sdpa(inputs: Inputs) -> Loss:
    mask, x = DenseMask.of(inputs), inputs.example
    causal = inputs.mask == {"causal": True}
    bias = None
    if mask.masked is not None and not causal:
        bias = torch.zeros(mask.masked.shape, dtype=x.dtype, device=x.device).masked_fill_(mask.masked, -torch.inf)
        length = mask.masked.shape[-1]
        bias = bias.expand(mask.weights.shape[0], inputs.heads if x.is_cuda else 1, length, length)
    kernels = _kernels(x, bias, causal)
    width = -(-max(inputs.widths) // 8) * 8  # the kernels need one width, on CUDA a multiple of 8
    scales = tuple(d**-0.5 for d in inputs.widths)

    return relation_sum(inputs, mask, partial(_Relation.apply, kernels, mask.weights, scales), width)


def flex(inputs: Inputs) -> Loss:
    """Three attentions per relation. Autograd combines their backwards."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not inputs.example.is_cuda:
        raise Unsupported("FlexAttention has no backward on CPUs")
    mask, device = DenseMask.of(inputs), inputs.example.device
    batch, _, length = mask.weights.shape
    blocks = None
    if mask.masked is not None:
        seen = ~mask.masked.expand(batch, 1, length, length)
        blocks = create_block_mask(lambda b, h, i, j: seen[b, 0, i, j], batch, None, length, length, device=device)
    width = max(16, 1 << (max(inputs.widths) - 1).bit_length())  # a power of two, 16 or more
    scale_t, scale_s = (d**-0.5 for d in inputs.widths)
    torch._dynamo.reset()
    attention = partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks, return_lse=True)

    def relation(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
        o_tt, lse_t = attention(q_t, k_t, k_t, scale=scale_t)
        o_ts, _ = attention(q_t, k_t, k_s, scale=scale_t)
        _, lse_s = attention(q_s, k_s, k_s, scale=scale_s)
        kl = scale_t * _dot(q_t, o_tt) - scale_s * _dot(q_s, o_ts) - lse_t + lse_s
        return (kl * mask.weights).sum()

    return relation_sum(inputs, mask, relation, width)
