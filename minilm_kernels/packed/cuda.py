"""Kernels for packed documents on CUDA: flash-attention, or those of PyTorch.

None of them waits for the device: the borders stay there.
"""

from __future__ import annotations

from functools import cache
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

        grouped: Any = {"enable_gqa": True} if groups > 1 else {}  # torch 2.11 does not know the argument
        sides = (window, 0 if causal else window)  # -1 is no bound
        varlen_attn: Any = varlen.varlen_attn
        return varlen_attn(query, key, value, *borders, scale=scale, window_size=sides, **grouped)
    key, value = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (key, value))
    rows = (x.contiguous()[None] for x in (query, key, value))
    output, *_ = torch.ops.aten._efficient_attention_forward(
        *rows, None, *borders, dropout, int(causal), torch.is_grad_enabled(), scale=scale
    )
    return output[0]
