"""One batch of rows as the tensors that the two models and the loss take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm_kernels.losses import QKV

from .data import PADDING, Rows


@dataclass(frozen=True)
class Counts:
    """Documents (that is, pieces of them) and tokens, padding left out: the weights of an exact average."""

    documents: int
    tokens: int

    @classmethod
    def of(cls, rows: Rows) -> Counts:
        return cls(int((rows.positions == 0).sum()), int((rows.positions != PADDING).sum()))

    def weight(self, reduction: str, total: Counts) -> float:
        """Factor of this part's loss so that the parts of `total` sum to the loss of all of it."""
        if reduction == "sequence":
            return self.documents / total.documents
        return self.tokens / total.tokens if reduction == "token" else 1.0


def prefix_lengths(rows: Rows, low: float, high: float, seed: tuple[int, ...]) -> np.ndarray:
    """Prefix of every document, (documents,) int64: its length times a share drawn from [low, high)."""
    starts = rows.positions.ravel() == 0
    real = rows.positions.ravel() != PADDING
    lengths = np.bincount(np.cumsum(starts)[real] - 1, minlength=int(starts.sum()))
    return np.rint(lengths * np.random.default_rng(seed).uniform(low, high, len(lengths))).astype(np.int64)


class Batch:
    """Rows on a device, ready for both models and the loss.

    Args:
        rows: B rows of S tokens; rows that hold one document each are trimmed to the longest.
        prefixes: for the prefix mask, (documents,) prefix lengths.
        causal: for the causal mask.
        packed: rows may hold several documents; the loss then takes their tokens flat, (T, hidden).
    """

    def __init__(
        self,
        rows: Rows,
        device: torch.device,
        *,
        packed: bool,
        causal: bool = False,
        prefixes: np.ndarray | None = None,
    ) -> None:
        if not packed:
            rows = Rows(*(part[:, : int((rows.positions != PADDING).sum(1).max())] for part in rows))
        positions = rows.positions.ravel()
        real = positions != PADDING
        starts = np.flatnonzero(positions[real] == 0)
        lengths = np.diff(np.append(starts, int(real.sum())))

        self.ids = torch.from_numpy(rows.ids.astype(np.int64)).to(device, non_blocking=True)  # (B, S)
        self.positions = torch.from_numpy(rows.positions.astype(np.int64)).to(device, non_blocking=True)  # (B, S)
        self.causal = causal
        self.prefixes = None if prefixes is None else torch.from_numpy(prefixes).to(device)  # (documents,)
        self._packed = packed
        self._real = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device)  # (T,)
        self._borders = torch.from_numpy(np.append(starts, int(real.sum())).astype(np.int32)).to(device)  # (N + 1,)
        self._longest = int(lengths.max())
        self._visible: Tensor | None = None

    def model_inputs(self, position_offset: int, additive: bool) -> dict[str, Any]:
        """Arguments of a model's forward.

        Args:
            position_offset: position id of a document's first token.
            additive: the model adds its mask to the scores (eager attention) and cannot take a boolean one.
        """
        mask: Tensor
        if self._packed or self.causal or self.prefixes is not None:
            mask = self._visible_pairs()
            if additive:
                mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float16).min)
        else:
            mask = self.positions != PADDING
        return {
            "input_ids": self.ids,
            "attention_mask": mask,
            "position_ids": self.positions.clamp(min=0) + position_offset,
        }

    def _visible_pairs(self) -> Tensor:
        """(B, 1, S, S) bool: whether row i sees j. Padding sees padding, so that no row is without any."""
        if self._visible is None:
            starts = self.positions == 0
            # Padding after the row's documents counts as one more of them.
            first_padding = (self.positions == PADDING) & (self.positions.roll(1, 1) != PADDING)
            document = (starts | first_padding).cumsum(1)  # (B, S), from 1 in every row
            visible = document[:, :, None] == document[:, None, :]
            if self.causal or self.prefixes is not None:
                order = torch.arange(self.ids.shape[1], device=self.ids.device)
                earlier = order[None, :, None] >= order[None, None, :]
                if self.prefixes is not None:
                    number = (starts.reshape(-1).cumsum(0) - 1).view_as(starts)
                    inside = (self.positions < self.prefixes[number]) & (self.positions != PADDING)  # (B, S)
                    earlier = earlier | inside[:, None, :]
                visible = visible & earlier
            self._visible = visible[:, None]
        return self._visible

    def for_loss(self, qkv: QKV) -> QKV:
        """Projections (B, S, hidden) as the loss takes them: packed, (T, hidden) without padding."""
        if not self._packed:
            return qkv
        flat = (x.flatten(0, 1) for x in qkv)
        return QKV(*flat) if self._real is None else QKV(*(x.index_select(0, self._real) for x in flat))

    def loss_arguments(self) -> Mapping[str, Any]:
        """The loss's mask arguments."""
        arguments: dict[str, Any] = {"causal": self.causal, "prefix_lens": self.prefixes}
        if self._packed:
            return {**arguments, "cu_seqlens": self._borders, "max_seqlen": self._longest}
        return {**arguments, "attention_mask": self.positions != PADDING}
