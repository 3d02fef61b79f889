"""The interface of a provider, and the mask of a call in the form that dense computations need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure.workload import Inputs, Loss


class Unsupported(Exception):
    """The provider cannot compute this; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss."""

    build: Callable[[Inputs], Loss]  # for inputs of these shapes and masks; may raise Unsupported
    about: str
    dense: bool = False  # allocates memory for every pair
    exponentials: int | None = None  # for loss and gradient of one pair of a self relation, if known


class DenseMask(NamedTuple):
    """The mask of sequences padded to one length, and the weights of their query rows."""

    tokens: Tensor | None  # (B, S) positions in packed inputs; None if the inputs are padded already
    masked: Tensor | None  # bool, broadcasts with (B, A, S, S); every row sees at least one key
    weights: Tensor  # (B, 1, S): weight of each row in the loss, 0 for padding

    @classmethod
    def of(cls, inputs: Inputs, dtype: torch.dtype = torch.float32) -> DenseMask:
        mask, x = inputs.mask, inputs.example
        tokens = None
        if "cu_seqlens" in mask:
            starts, lengths = mask["cu_seqlens"][:-1].long(), mask["cu_seqlens"].diff().long()
            position = torch.arange(int(lengths.max()), device=x.device)
            valid = position < lengths[:, None]
            tokens = torch.where(valid, starts[:, None] + position, 0)
        else:
            position = torch.arange(x.shape[1], device=x.device)
            valid = mask.get("attention_mask", torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)) != 0
        weights = (valid.to(dtype) / (inputs.heads * len(valid) * valid.sum(1, keepdim=True)))[:, None, :]
        masked = None if valid.all() else ~valid[:, None, None, :]
        if mask.get("causal") or "prefix_lens" in mask:
            later = position > position[:, None]
            if "prefix_lens" in mask:
                later = later & (position >= mask["prefix_lens"][:, None, None, None])
            masked = later if masked is None else masked | later
            masked = masked & (position != position[:, None])
        return cls(tokens, masked, weights)

    def padded(self, x: Tensor) -> Tensor:
        """(B, A, S, D) heads."""
        return (x if self.tokens is None else x[self.tokens]).transpose(1, 2)
