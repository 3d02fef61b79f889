"""`packed_attention`: softmax attention within the documents of one row of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, cuda

__all__ = ["packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    prefix_lens: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in which every token sees the tokens of its own document, without a mask or matrix of S x S.

    The output is `softmax(scale * query @ key.T) @ value` of every document. It is differentiable once. On a CPU,
    PyTorch's fused kernel runs for each document; on CUDA, flash-attention if it is installed, and PyTorch's kernels
    otherwise, which need bfloat16 or float16 for windows. Dropout takes random numbers of PyTorch's default generator.

    Args:
        query: (T, heads, width), any floating-point dtype.
        key: (T, key heads, width), in the dtype of `query`; the key heads divide the heads.
        value: like `key`.
        cu_seqlens: the borders of the documents, (N + 1,) int32, from 0 to T. Empty documents are allowed.
        max_seqlen: at least the tokens of the longest document.
        scale: factor of the scores, by default 1/√width.
        causal: True if a token sees no later ones.
        window: the largest distance of a visible token, on both sides; None for no bound.
        prefix_lens: tokens of each document's prefix, (N,) integer: a token sees the prefix and earlier tokens.
        dropout: share of probabilities that are dropped; the others are scaled up.

    Returns:
        (T, heads, width).

    Raises:
        TypeError: a dtype differs, or `cu_seqlens` is not int32.
        ValueError: a shape or a number is wrong; the device is neither a CPU nor CUDA, or has no kernel for the dtype,
            the window and the dropout; on a CPU, `cu_seqlens` does not rise from 0 to T, or a document is longer than
            `max_seqlen`.

    Example:
        >>> import torch
        >>> from minilm_kernels.packed import packed_attention
        >>> query, key, value = torch.randn(3, 10, 4, 8)
        >>> borders = torch.tensor([0, 7, 10], dtype=torch.int32)  # documents of 7 and of 3 tokens
        >>> packed_attention(query, key, value, borders, 7).shape
        torch.Size([10, 4, 8])
    """
    _check(query, key, value, cu_seqlens, window, dropout)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = (max_seqlen, scale, -1 if window is None else window, dropout)
    if prefix_lens is None:
        return _attend(query, key, value, cu_seqlens, causal, *options)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if prefix_lens.shape != starts.shape:
        raise ValueError(f"prefix_lens: expected ({len(starts)},), a number a document, got {tuple(prefix_lens.shape)}")
    # A token of a prefix sees just the prefix, as if that were a document; every other token sees just what a causal
    # mask shows it.
    middles = (starts + prefix_lens.to(starts.dtype)).minimum(ends)
    halves = torch.cat([torch.stack([starts, middles], 1).flatten(), ends[-1:]])
    place = torch.arange(len(query), dtype=torch.int32, device=query.device)
    inside = place < middles[torch.searchsorted(ends, place, right=True)]
    return torch.where(
        inside[:, None, None],
        _attend(query, key, value, halves, False, *options),
        _attend(query, key, value, cu_seqlens, True, *options),
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    max_seqlen: int,
    scale: float,
    window: int,
    dropout: float,
) -> Tensor:
    if query.is_cuda:
        return cuda.attend(query, key, value, cu_seqlens, max_seqlen, scale, causal, window, dropout)
    # The operator gets its seed as an argument, so that it computes the same whenever it is repeated.
    seed = torch.randint(2**62, ()) if dropout else None
    return cpu.attend(query, key, value, cu_seqlens, seed, max_seqlen, scale, causal, window, dropout)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int | None, dropout: float) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 3 or key.shape != value.shape:
        raise ValueError(f"expected query (T, heads, width), and key and value (T, key heads, width); got {shapes}")
    if query.shape[::2] != key.shape[::2] or not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(f"query and key need equal T and width, and key heads that divide the heads; got {shapes}")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise TypeError(f"expected one floating-point dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    if query.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"query: packed attention runs on cpu and cuda, got a tensor on {query.device}")
    if not key.device == value.device == cu_seqlens.device == query.device:
        raise ValueError(
            f"expected one device, got query on {query.device}, key on {key.device}, value on {value.device}, "
            f"cu_seqlens on {cu_seqlens.device}"
        )
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected (N + 1,) with N of 1 or more, got {tuple(cu_seqlens.shape)}")
    if window is not None and window < 0:
        raise ValueError(f"window={window}: expected a distance of 0 or more, or None")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: expected a share in [0, 1)")
