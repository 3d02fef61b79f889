"""What providers are made of, and every mask as those who compute densely need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workloads import Inputs

Loss = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]


class Unsupported(Exception):
    """The provider cannot compute this; the message says why."""


class DenseMask(NamedTuple):
    """Of sequences padded to one length: keys to hide from rows, and what a row counts in the loss."""

    tokens: Tensor | None  # (B, S): where the tokens of packed inputs go; None: they are padded already
    hidden: Tensor | None  # bool, to broadcast with (B, A, S, S); every row sees some key
    weights: Tensor  # (B, 1, S) float32; 0 for rows that are not real

    @classmethod
    def of(cls, inputs: Inputs) -> DenseMask:
        mask = inputs.mask
        x = next(iter(inputs.student.values()))
        tokens = None
        if "cu_seqlens" in mask:
            starts, lengths = mask["cu_seqlens"][:-1].long(), mask["cu_seqlens"].diff().long()
            position = torch.arange(int(lengths.max()), device=x.device)
            real = position < lengths[:, None]
            tokens = torch.where(real, starts[:, None] + position, 0)
        else:
            position = torch.arange(x.shape[1], device=x.device)
            real = mask.get("attention_mask", torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)) != 0
        weights = (real / (inputs.heads * len(real) * real.sum(1, keepdim=True)))[:, None, :]
        hidden = None if real.all() else ~real[:, None, None, :]
        if mask.get("causal") or "prefix_lens" in mask:
            later = position > position[:, None]
            if "prefix_lens" in mask:
                later = later & (position >= mask["prefix_lens"][:, None, None, None])
            hidden = later if hidden is None else hidden | later
            hidden = hidden & (position != position[:, None])
        return cls(tokens, hidden, weights)

    def padded(self, x: Tensor) -> Tensor:
        """(B, A, S, D) of heads as they come."""
        return (x if self.tokens is None else x[self.tokens]).transpose(1, 2)


def widths(inputs: Inputs) -> tuple[int, int]:
    """(D_t, D_s)."""
    return next(iter(inputs.teacher.values())).shape[-1], next(iter(inputs.student.values())).shape[-1]
