"""Masks that all backends share: valid tokens, visible keys, rows that count and their weight in a reduced loss.

A mask is stored as the caller passes it: a padding mask or cu_seqlens, a causal flag, prefix lengths, a query mask.
Only `Mask.dense` builds a tensor of size S×S; the reference backend uses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from typing_extensions import TypedDict

from minilm_kernels._choices import Reduction


class MaskArgs(TypedDict, total=False):
    """Keyword arguments, besides `attention_mask`, that describe rows and the keys they see; see `relation_kl`."""

    cu_seqlens: Tensor | None
    max_seqlen: int | None
    causal: bool
    prefix_lens: Tensor | None
    query_mask: Tensor | None


def host_readable(x: Tensor) -> bool:
    """Returns whether the host can read the values of x without waiting: x has values and is on the CPU."""
    return has_values(x) and x.device.type == "cpu"


def has_values(x: Tensor) -> bool:
    """Returns whether x is memory with values. False for traced and fake tensors, and those batched by vmap."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch.jit.is_tracing():
        return False
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE)):
        return False
    functorch = torch._C._functorch
    return not (functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


@dataclass(frozen=True)
class Mask:
    """The masks of one call. `token_shape` is (B, S) for dense inputs and (T,) for packed ones."""

    token_shape: tuple[int, ...]
    device: torch.device
    attention_mask: Tensor | None = None  # (B, S) bool or integer, nonzero on valid tokens
    cu_seqlens: Tensor | None = None  # (N + 1,) int32
    max_seqlen: int | None = None
    causal: bool = False
    prefix_lens: Tensor | None = None  # (B,) or (N,) integer
    query_mask: Tensor | None = None  # (B, S) or (T,) bool or integer, nonzero on rows that count

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
        """Valid tokens: bool of shape `token_shape`."""
        if self.attention_mask is None:
            return torch.ones(self.token_shape, dtype=torch.bool, device=self.device)
        return self.attention_mask != 0

    @cached_property
    def counted(self) -> Tensor:
        """Rows that count, which are valid and not left out by `query_mask`: bool of shape `token_shape`."""
        return self.valid if self.query_mask is None else self.valid & (self.query_mask != 0)

    @cached_property
    def lengths(self) -> Tensor:
        """Number of valid tokens of each sequence: (N,) int64."""
        if self.cu_seqlens is not None:
            return self.cu_seqlens.diff().long()
        if self.attention_mask is None:
            return torch.full(self.token_shape[:1], self.token_shape[1], device=self.device)
        return self.valid.sum(-1)

    @cached_property
    def row_counts(self) -> Tensor:
        """Number of rows of each sequence that count: (N,) int64."""
        if self.query_mask is None:
            return self.lengths
        if self.cu_seqlens is None:
            return self.counted.sum(-1)
        before = torch.nn.functional.pad(self.counted.cumsum(0), (1, 0))
        return before[self.cu_seqlens.long().clamp(0, self.token_shape[0])].diff()  # the bounds may be malformed

    def sequences_and_positions(self) -> tuple[Tensor, Tensor]:
        """Returns each token's sequence index and its position in that sequence: two int64 of shape `token_shape`."""
        if self.cu_seqlens is None:
            batch, length = self.token_shape
            sequences = torch.arange(batch, device=self.device)[:, None].expand(batch, length)
            return sequences, torch.arange(length, device=self.device).expand(batch, length)
        self.check_bounds()
        token = torch.arange(self.token_shape[0], device=self.device)
        sequences = torch.searchsorted(self.cu_seqlens[1:].long(), token, right=True)
        return sequences, token - self.cu_seqlens.long()[sequences]

    def unpad(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Converts every kind of mask to one form, a run of valid tokens per sequence, without waiting for the device.

        Rows and keys are counted within the run. Row i sees key j if j ≤ i or j < prefix; with a bidirectional mask it
        sees the whole run.

        Returns:
            positions: (B·S,) or (T,) int64, the positions of the valid tokens, sequence after sequence. Entries after
                the last valid token are arbitrary.
            starts: (N + 1,) int64, the bounds of each sequence's run in `positions`.
            prefixes: (N,) int64, the number of valid tokens in each prefix; None without `prefix_lens`.
        """
        lengths = self.lengths
        if self.cu_seqlens is None:
            starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        else:
            starts = self.cu_seqlens.long()
        if self.attention_mask is None:
            positions = torch.arange(self.token_shape[-1], device=self.device).repeat(prod(self.token_shape[:-1]))
        else:
            valid = self.valid
            total = valid.numel()
            target = torch.where(valid, starts[:-1, None] + valid.cumsum(-1) - 1, total)  # padding goes to the end
            position = torch.arange(self.token_shape[-1], device=self.device).expand_as(target)
            positions = target.new_zeros(total + 1).scatter_(0, target.flatten(), position.flatten())[:total]
        if self.prefix_lens is None:
            return positions, starts, None
        if self.packed:
            return positions, starts, self.prefix_lens.long().clamp(min=0).minimum(lengths)
        in_prefix = torch.arange(self.token_shape[-1], device=self.device) < self.prefix_lens.long()[:, None]
        return positions, starts, (self.valid & in_prefix).sum(-1)

    def prefix_integers(self) -> Tensor | None:
        """Returns `prefix_lens` as contiguous int32 or int64."""
        if self.prefix_lens is None:
            return None
        wide = self.prefix_lens.dtype in (torch.int32, torch.int64)
        return (self.prefix_lens if wide else self.prefix_lens.long()).contiguous()

    def dense(self) -> Tensor:
        """Returns whether row i counts and sees key j: bool of shape (B, S, S), or (1, T, T) for packed inputs."""
        valid, counted = self.valid, self.counted
        sequence, position = self.sequences_and_positions()
        if self.packed:
            valid, counted, sequence, position = valid[None], counted[None], sequence[None], position[None]
        visible = counted[:, :, None] & valid[:, None, :] & (sequence[:, :, None] == sequence[:, None, :])
        if self.bidirectional:
            return visible
        allowed = position[:, None, :] <= position[:, :, None]
        if self.prefix_lens is not None:
            allowed = allowed | (position < self.prefix_lens.long()[sequence])[:, None, :]
        return visible & allowed

    def sequence_weights(self, reduction: Reduction, heads: int, dtype: torch.dtype) -> Tensor:
        """Returns the weight in the reduced loss of each row of a sequence that counts, (N,)."""
        counts = self.row_counts
        if reduction == "sum":
            return torch.ones(counts.shape, dtype=dtype, device=self.device)
        if reduction == "token":
            return (1 / (heads * counts.sum().clamp(min=1).to(dtype))).expand(counts.shape)
        nonempty = (counts > 0).sum().clamp(min=1).to(dtype)
        return 1 / (heads * nonempty * counts.clamp(min=1).to(dtype))

    def check_packing(self) -> None:
        """Checks the shape of `cu_seqlens` and, on a CPU, its values. On an accelerator, reading them would wait."""
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
        """Checks the values of `cu_seqlens`. On an accelerator, the host waits for them."""
        if self.cu_seqlens is None:
            return
        bounds, total = self.cu_seqlens.tolist(), self.token_shape[0]
        lengths = [end - start for start, end in pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
            shown = str(bounds) if len(bounds) <= 16 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
            raise ValueError(f"cu_seqlens: expected to rise from 0 to the {total} packed tokens, got {shown}")
        if self.max_seqlen is not None and max(lengths, default=0) > self.max_seqlen:
            raise ValueError(
                f"max_seqlen: expected no less than the longest sequence, {max(lengths)} tokens, got {self.max_seqlen}"
            )
