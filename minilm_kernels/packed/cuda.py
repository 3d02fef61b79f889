"""Kernels for packed documents on CUDA: flash-attention, or those of PyTorch.

None of them waits for the device: the borders stay there.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@cache
def _flash_attention() -> Any:
    """`flash_attn_varlen_func` of the package flash-attn; None if it is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def kernel(dtype: torch.dtype, window: int, dropout: float) -> str:
    """Name of the kernel that serves a call.

    "flash_attn" has everything, in 16 bits; "varlen" (PyTorch's flash-attention) has no dropout; "efficient" (PyTorch's
    memory-efficient attention) has float32 and dropout, but no windows.

    Raises:
        ValueError: no kernel serves it. The message says what would.
    """
    if dtype in HALF and _flash_attention() is not None:
        return "flash_attn"
    if dtype in HALF and not dropout:
        return "varlen"
    if window >= 0:
        remedy = "set --dropout 0, or install flash-attn" if dtype in HALF else "use bfloat16 (--bf16)"
        raise ValueError(
            f"packed attention on CUDA: no kernel has windows in {dtype} with dropout {dropout}; {remedy}, or keep the "
            "mask (--attention mask)"
        )
    if dtype not in (*HALF, torch.float32):
        raise ValueError(f"packed attention on CUDA: expected float32, float16 or bfloat16, got {dtype}")
    return "efficient"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int,
    dropout: float,
) -> Tensor:
    """Output, (T, heads, width). `window` is -1 without one."""
    name = kernel(query.dtype, window, dropout)
    borders = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if name == "flash_attn":
        return _flash_attention()(
            *(query, key, value, *borders),
            dropout_p=dropout,
            softmax_scale=scale,
            causal=causal,
            window_size=(window, window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    if name == "varlen":
        from torch.nn.attention import varlen

        varlen_attn: Any = varlen.varlen_attn
        options: dict[str, Any] = {"scale": scale, "window_size": (window, 0 if causal else window)}  # -1 is no bound
        if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:  # torch 2.11 lacks it
            options["enable_gqa"], groups = True, 1
        return varlen_attn(query, *_repeated(groups, key, value), *borders, **options)
    key, value = _repeated(groups, key, value)
    return _efficient(query, key, value, cu_seqlens, max_seqlen, scale, causal, dropout)[0]


def _repeated(groups: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each key head as often as it has query heads."""
    return tensors if groups == 1 else tuple(x.repeat_interleave(groups, 1) for x in tensors)


# PyTorch's operators have no working shape function of the backward (2.13), which torch.compile needs.
@torch.library.custom_op("minilm_kernels::packed_attention_efficient", mutates_args=())
def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, (T, heads, width), log-sum-exp of the scores, (N, heads, max_seqlen), and the place of random numbers."""
    rows = [x.contiguous()[None] for x in (query, key, value)]
    borders = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    output, lse, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
        *rows, None, *borders, dropout, int(causal), True, scale=scale
    )
    return output[0], lse, seed, offset


@_efficient.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, *_: Any) -> tuple[Tensor, ...]:
    lse = query.new_empty(len(cu_seqlens) - 1, query.shape[1], -(-max_seqlen // 32) * 32, dtype=torch.float32)
    seed, offset = (torch.empty((), dtype=torch.int64, device="cpu") for _ in range(2))
    return query.new_empty(query.shape), lse, seed, offset


@torch.library.custom_op("minilm_kernels::packed_attention_efficient_backward", mutates_args=())
def _efficient_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    output: Tensor,
    lse: Tensor,
    seed: Tensor,
    offset: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, query, key, value, output = (x.contiguous()[None] for x in (gradient, query, key, value, output))
    borders = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    random = (lse, dropout, seed, offset)
    grads = torch.ops.aten._efficient_attention_backward(
        *(gradient, query, key, value, None, output, *borders, *random, int(causal), False), scale=scale
    )
    return grads[0][0], grads[1][0], grads[2][0]


@_efficient_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.max_seqlen, ctx.scale, ctx.causal, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple:
    options = (ctx.max_seqlen, ctx.scale, ctx.causal, ctx.dropout)
    return *_efficient_backward(gradient, *ctx.saved_tensors, *options), *(None,) * 5


_efficient.register_autograd(_backward, setup_context=_setup_context)
