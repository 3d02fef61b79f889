"""The mask vocabulary that every backend shares: which tokens are real, which key a row sees, what a row weighs.

A mask is kept as the caller gave it (a padding mask or cu_seqlens, a causal flag, prefix lengths); nothing of size
S x S is built here except in `visible`, which serves the dense reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

REDUCTIONS = ("sequence", "token", "sum", "none")


def readable(x: Tensor) -> bool:
    """Whether values can be looked at for nothing: not traced, fake or batched, nor on a device to be waited for."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or torch.jit.is_tracing():
        return False
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE)):
        return False
    functorch = torch._C._functorch
    return not (functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


@dataclass(frozen=True)
class Mask:
    """Masks of one call. Dense inputs have shape `token_shape` = (B, S), packed inputs (T,) and `cu_seqlens`."""

    token_shape: tuple[int, ...]
    device: torch.device
    attention_mask: Tensor | None = None  # (B, S) bool or integer, nonzero = real token
    cu_seqlens: Tensor | None = None  # (N + 1,) int32
    max_seqlen: int | None = None
    causal: bool = False
    prefix_lens: Tensor | None = None  # (B,) or (N,) integer

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def bidirectional(self) -> bool:
        return not self.causal and self.prefix_lens is None

    @property
    def num_sequences(self) -> int:
        return self.token_shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @cached_property
    def valid(self) -> Tensor:
        """(B, S) or (T,) bool: the tokens that take part."""
        if self.attention_mask is None:
            return torch.ones(self.token_shape, dtype=torch.bool, device=self.device)
        return self.attention_mask != 0

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) int64: real tokens of each sequence."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        if self.attention_mask is None:
            return torch.full(self.token_shape[:1], self.token_shape[1], device=self.device)
        return self.valid.sum(-1)

    def sequence_and_position(self) -> tuple[Tensor, Tensor]:
        """Of each token, the index of its sequence and its position there: two int64 tensors of shape `token_shape`."""
        if self.cu_seqlens is None:
            batch, length = self.token_shape
            sequence = torch.arange(batch, device=self.device)[:, None].expand(batch, length)
            return sequence, torch.arange(length, device=self.device).expand(batch, length)
        self.check_bounds()
        token = torch.arange(self.token_shape[0], device=self.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:].long(), token, right=True)
        return sequence, token - self.cu_seqlens.long()[sequence]

    def unpad(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Every mask in one form: the real tokens of each sequence side by side, all int64; no host is waited for.

        Positions of the real tokens, sequence after sequence, as in `token_shape`, then anything up to B·S or T;
        (N + 1,) where each sequence starts among them; and (N,), given prefixes, how many of a sequence's real tokens
        lie in its prefix. Row i of a sequence then sees the gathered tokens j ≤ i and j < prefix, or, with a
        bidirectional mask, all.
        """
        lengths = self.lengths
        if self.cu_seqlens is None:
            starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        else:
            starts = self.cu_seqlens.long()
        if self.attention_mask is None:
            tokens = torch.arange(self.token_shape[-1], device=self.device).repeat(prod(self.token_shape[:-1]))
        else:
            real = self.valid
            total = real.numel()
            place = torch.where(real, starts[:-1, None] + real.cumsum(-1) - 1, total)  # hidden ones behind the end
            position = torch.arange(self.token_shape[-1], device=self.device).expand_as(place)
            tokens = place.new_zeros(total + 1).scatter_(0, place.flatten(), position.flatten())[:total]
        if self.prefix_lens is None:
            return tokens, starts, None
        if self.packed:
            return tokens, starts, self.prefix_lens.long().clamp(min=0).minimum(lengths)
        inside = torch.arange(self.token_shape[-1], device=self.device) < self.prefix_lens.long()[:, None]
        return tokens, starts, (self.valid & inside).sum(-1)

    def dense(self) -> Tensor:
        """(B, S, S), or (1, T, T) for packed inputs, bool: row i sees key j. Dense: for the reference only."""
        real = self.valid
        sequence, position = self.sequence_and_position()
        if self.packed:
            real, sequence, position = real[None], sequence[None], position[None]
        see = real[:, :, None] & real[:, None, :] & (sequence[:, :, None] == sequence[:, None, :])
        if self.bidirectional:
            return see
        within = position[:, None, :] <= position[:, :, None]
        if self.prefix_lens is not None:
            within = within | (position < self.prefix_lens.long()[sequence])[:, None, :]
        return see & within

    def sequence_weights(self, reduction: str, heads: int, dtype: torch.dtype) -> Tensor:
        """(N,): what one row of each sequence counts in the scalar; a sequence without tokens counts nothing."""
        lengths = self.lengths
        if reduction == "sum":
            return torch.ones(lengths.shape, dtype=dtype, device=self.device)
        if reduction == "token":
            return (1 / (heads * lengths.sum().clamp(min=1).to(dtype))).expand(lengths.shape)
        counted = (lengths > 0).sum().clamp(min=1).to(dtype)
        return 1 / (heads * counted * lengths.clamp(min=1).to(dtype))

    def repaired(self) -> tuple[Mask, Tensor | None]:
        """A mask that kernels can trust where nobody reads `cu_seqlens`, and what belongs on every result of the call.

        The second is 0 where the packing is well-formed and NaN where it is not; `marked` adds it. The mask then has N
        sequences of about T / N tokens: every token gets a result, and no access leaves the tensors. The host is not
        waited for. Dense inputs need no repair: the mask itself, and None.
        """
        if self.cu_seqlens is None or self.num_sequences == 0:
            return self, None
        sequences, total = self.num_sequences, self.token_shape[0]
        bounds = self.cu_seqlens.long()
        lengths = bounds.diff()
        shortest, longest = lengths.aminmax()
        malformed = (bounds[0] != 0) | (bounds[-1] != total) | (shortest < 0)
        if self.max_seqlen is not None:
            malformed |= longest > self.max_seqlen
        even = torch.arange(sequences + 1, device=self.device) * total // sequences
        mask = replace(
            self,
            cu_seqlens=torch.where(malformed, even, bounds).to(self.cu_seqlens.dtype),
            max_seqlen=None if self.max_seqlen is None else max(self.max_seqlen, -(-total // sequences)),
        )
        return mask, torch.zeros((), dtype=torch.float32, device=self.device).masked_fill(malformed, torch.nan)

    def check_packing(self) -> None:
        """Checks `cu_seqlens`; on an accelerator, where reading their values would stall, no more than the shape."""
        if self.cu_seqlens is None:
            return
        if self.num_sequences == 0 and self.token_shape[0]:
            raise ValueError(
                f"cu_seqlens: expected the bounds of one sequence or more for {self.token_shape[0]} packed tokens, "
                f"got shape {tuple(self.cu_seqlens.shape)}"
            )
        if self.device.type == "cpu":
            self.check_bounds()

    def check_bounds(self) -> None:
        """Checks the values of `cu_seqlens`, for which the host waits where they lie on an accelerator."""
        if self.cu_seqlens is None:
            return
        bounds, total = self.cu_seqlens.tolist(), self.token_shape[0]
        lengths = [end - start for start, end in pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
            shown = str(bounds) if len(bounds) <= 16 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
            raise ValueError(f"cu_seqlens: expected to rise from 0 to the {total} packed tokens, got {shown}")
        if self.max_seqlen is not None and max(lengths, default=0) > self.max_seqlen:
            raise ValueError(
                f"max_seqlen: expected at least the longest sequence, {max(lengths)} tokens, got {self.max_seqlen}"
            )


def marked(x: Tensor, fault: Tensor | None) -> Tensor:
    """A result, or what results are multiplied by, with the NaN of a malformed packing (`Mask.repaired`)."""
    return x if fault is None else x + fault
