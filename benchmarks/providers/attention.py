"""Baselines composed from attention kernels: no score matrix in memory, but many visits of every pair.

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
from torch.nn.functional import pad

from benchmarks.workloads import Inputs

from .support import DenseMask, Loss, Unsupported, widths


class _Kernels(NamedTuple):
    """One library's attention over (B, A, S, D): output and log-sum-exp, and the value's gradient."""

    forward: Callable[..., tuple[Tensor, Tensor, tuple]]  # q, k, v, scale -> output, lse, what the gradient needs
    value_grad: Callable[..., Tensor]  # output's gradient, q, k, v, output, lse, that, scale


def _cpu_kernels(bias: Tensor | None, causal: bool) -> _Kernels:
    operators = torch.ops.aten

    def forward(q, k, v, scale):
        out, lse = operators._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=bias, scale=scale
        )
        return out, lse, ()

    def value_grad(grad, q, k, v, out, lse, rest, scale):
        return operators._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )[2]

    return _Kernels(forward, value_grad)


def _flash_kernels(causal: bool) -> _Kernels:
    operators = torch.ops.aten

    def forward(q, k, v, scale):
        out, lse, *rest = operators._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)
        return out, lse, tuple(rest[:6])

    def value_grad(grad, q, k, v, out, lse, rest, scale):
        starts_q, starts_k, longest_q, longest_k, seed, offset = rest
        return operators._scaled_dot_product_flash_attention_backward(
            *(grad, q, k, v, out, lse, starts_q, starts_k, longest_q, longest_k, 0.0, causal, seed, offset), scale=scale
        )[2]

    return _Kernels(forward, value_grad)


def _efficient_kernels(bias: Tensor | None, causal: bool) -> _Kernels:
    operators = torch.ops.aten

    def forward(q, k, v, scale):
        out, lse, *rest = operators._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, is_causal=causal, scale=scale
        )
        return out, lse, tuple(rest)

    def value_grad(grad, q, k, v, out, lse, rest, scale):
        return operators._scaled_dot_product_efficient_attention_backward(
            *(grad, q, k, v, bias, out, lse, *rest, 0.0, [True, True, True, False], causal), scale=scale
        )[2]

    return _Kernels(forward, value_grad)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Of the last axis, in float32: KL is a small difference of such products."""
    return (x.float() * y.float()).sum(-1)


class _Relation(torch.autograd.Function):
    """KL of one relation; (B, A, S, D) operands, all padded to one width. Its gradient is computed in the forward."""

    @staticmethod
    def forward(ctx, kernels: _Kernels, weights, scales, q_t, k_t, q_s, k_s):
        scale_t, scale_s = scales
        o_tt, lse_t, _ = kernels.forward(q_t, k_t, k_t, scale_t)
        o_ts, lse_ts, rest_t = kernels.forward(q_t, k_t, k_s, scale_t)
        o_ss, lse_s, rest_s = kernels.forward(q_s, k_s, k_s, scale_s)
        length = q_t.shape[2]
        lse = lse_s[..., :length] - lse_t[..., :length]  # some kernels round its length up
        kl = scale_t * _dot(q_t, o_tt) - scale_s * _dot(q_s, o_ts)
        if any(ctx.needs_input_grad):
            g = weights[..., None]
            upstream = (g * q_s).to(q_s.dtype)
            query_grad = scale_s * g * (o_ss - o_ts)
            key_grad = scale_s * (
                kernels.value_grad(upstream, q_s, k_s, k_s, o_ss, lse_s, rest_s, scale_s)
                - kernels.value_grad(upstream, q_t, k_t, k_s, o_ts, lse_ts, rest_t, scale_t)
            )
            ctx.save_for_backward(query_grad.to(q_s.dtype), key_grad)
        return ((kl + lse) * weights).sum()

    @staticmethod
    def backward(ctx, grad):
        query_grad, key_grad = ctx.saved_tensors
        return (
            None,
            None,
            None,
            None,
            None,
            (grad * query_grad).to(query_grad.dtype),
            (grad * key_grad).to(key_grad.dtype),
        )


def sdpa(inputs: Inputs) -> Loss:
    """CPU: PyTorch's fused kernel. CUDA: flash attention in half precision, memory-efficient attention otherwise."""
    mask = DenseMask.of(inputs)
    x = next(iter(inputs.student.values()))
    causal = inputs.mask == {"causal": True}
    bias = None
    if mask.hidden is not None and not causal:
        bias = torch.zeros(mask.hidden.shape, dtype=x.dtype, device=x.device).masked_fill_(mask.hidden, -torch.inf)
        length = mask.hidden.shape[-1]
        bias = bias.expand(mask.weights.shape[0], inputs.heads if x.is_cuda else 1, length, length)
    if not x.is_cuda:
        kernels = _cpu_kernels(bias, causal)
    elif x.dtype == torch.float32 or bias is not None:
        kernels = _efficient_kernels(bias, causal)
    else:
        kernels = _flash_kernels(causal)
    width_t, width_s = widths(inputs)
    wide = -(-max(width_t, width_s) // 8) * 8  # the kernels want one width, on CUDA a multiple of 8
    scales = (width_t**-0.5, width_s**-0.5)

    def operand(x: Tensor) -> Tensor:
        return pad(mask.padded(x), (0, wide - x.shape[-1]))

    def loss(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> Tensor:
        sides = [{name: operand(x) for name, x in side.items()} for side in (teacher, student)]
        parts = [
            _Relation.apply(kernels, mask.weights, scales, *(side[name] for side in sides for name in names))
            for names in inputs.relations
        ]
        return torch.stack(parts).sum()

    return loss


def flex(inputs: Inputs) -> Loss:
    """Three attentions a relation and their own backwards, which autograd composes."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x = next(iter(inputs.student.values()))
    if not x.is_cuda:
        raise Unsupported("FlexAttention has no backward on CPUs")
    mask = DenseMask.of(inputs)
    batch, _, length = mask.weights.shape
    block_mask = None
    if mask.hidden is not None:
        seen = ~mask.hidden.expand(batch, 1, length, length)
        block_mask = create_block_mask(
            lambda b, h, i, j: seen[b, 0, i, j], batch, None, length, length, device=x.device
        )
    width_t, width_s = widths(inputs)
    wide = max(16, 1 << (max(width_t, width_s) - 1).bit_length())  # powers of two from 16 on
    torch._dynamo.reset()
    attention = partial(torch.compile(flex_attention, dynamic=False), block_mask=block_mask, return_lse=True)

    def operand(x: Tensor) -> Tensor:
        return pad(mask.padded(x), (0, wide - x.shape[-1]))

    def loss(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> Tensor:
        parts = []
        for query, key in inputs.relations:
            q_t, k_t = operand(teacher[query]), operand(teacher[key])
            q_s, k_s = operand(student[query]), operand(student[key])
            o_tt, lse_t = attention(q_t, k_t, k_t, scale=width_t**-0.5)
            o_ts, _ = attention(q_t, k_t, k_s, scale=width_t**-0.5)
            _, lse_s = attention(q_s, k_s, k_s, scale=width_s**-0.5)
            kl = width_t**-0.5 * _dot(q_t, o_tt) - width_s**-0.5 * _dot(q_s, o_ts) - lse_t + lse_s
            parts.append((kl * mask.weights).sum())
        return torch.stack(parts).sum()

    return loss
