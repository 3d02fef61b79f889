"""A batch of samples as the tensors that the two models and the loss take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilm_kernels.losses import QKV

from .packing import PADDING, Samples


@dataclass(frozen=True)
class LossWeights:
    """Numbers of documents (or their pieces) and of valid tokens, as weights for the losses of parts of a batch."""

    documents: int
    tokens: int

    @classmethod
    def of(cls, samples: Samples) -> LossWeights:
        """Counts the documents and tokens of samples."""
        return cls(int((samples.positions == 0).sum()), int((samples.positions != PADDING).sum()))

    def weight(self, reduction: str, total: LossWeights) -> float:
        """Factor of this part's loss. The weighted losses of all parts add up to the loss of `total`."""
        if reduction == "sequence":
            return self.documents / total.documents
        return self.tokens / total.tokens if reduction == "token" else 1.0


def prefix_lengths(samples: Samples, low: float, high: float, seed: tuple[int, ...]) -> np.ndarray:
    """Prefix length of every document, (documents,) int64: its length times a share drawn from [low, high)."""
    starts = samples.positions.ravel() == 0
    valid = samples.positions.ravel() != PADDING
    lengths = np.bincount(np.cumsum(starts)[valid] - 1, minlength=int(starts.sum()))
    return np.rint(lengths * np.random.default_rng(seed).uniform(low, high, len(lengths))).astype(np.int64)


class Batch:
    """Samples on a device, as inputs of both models and of the loss.

    Args:
        samples: B samples of S tokens. Without packing, they are trimmed to the length of the longest.
        packed: True if a sample may contain several documents. The loss then takes the valid tokens of all samples,
            (T, hidden).
        causal: True to use the causal mask.
        prefixes: prefix lengths for the prefix mask, (documents,).

    Attributes:
        ids: token ids, (B, S) int64.
        positions: positions in the documents, (B, S) int64.
    """

    def __init__(
        self,
        samples: Samples,
        device: torch.device,
        *,
        packed: bool,
        causal: bool = False,
        prefixes: np.ndarray | None = None,
    ) -> None:
        if not packed:
            samples = Samples(*(part[:, : int((samples.positions != PADDING).sum(1).max())] for part in samples))
        positions = samples.positions.ravel()
        valid = positions != PADDING
        starts = np.flatnonzero(positions[valid] == 0)
        lengths = np.diff(np.append(starts, int(valid.sum())))

        self.ids = torch.from_numpy(samples.ids.astype(np.int64)).to(device, non_blocking=True)
        self.positions = torch.from_numpy(samples.positions.astype(np.int64)).to(device, non_blocking=True)
        self.causal = causal
        self.prefixes = None if prefixes is None else torch.from_numpy(prefixes).to(device)  # (documents,)
        self._packed = packed
        self._valid = None if valid.all() else torch.from_numpy(np.flatnonzero(valid)).to(device)  # (T,)
        self._cu_seqlens = torch.from_numpy(np.append(starts, int(valid.sum())).astype(np.int32)).to(device)  # (N + 1,)
        self._longest = int(lengths.max())
        self._mask: Tensor | None = None

    def pinned(self) -> Batch:
        """The batch in pinned memory, from which `to` copies without waiting for the device."""
        return self._with_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        twin = copy.copy(self)
        vars(twin).update({name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)})
        return twin

    @torch.inference_mode(False)  # the student shares masks with the teacher, which runs in inference mode
    def model_inputs(
        self, position_offset: int, additive: bool, *, causal_model: bool = False, reach: int | None = None
    ) -> dict[str, Any]:
        """Arguments for the forward of a model.

        Args:
            position_offset: position id of a document's first token.
            additive: True if the model adds its mask to the scores (eager attention) and accepts no boolean mask.
            causal_model: True if the model itself attends to earlier tokens only.
            reach: for models with layers that attend to near tokens only, the largest distance of these tokens.
        """
        mask: Any
        if self._packed or self.causal != causal_model or self.prefixes is not None:
            full = self._attention_mask()
            if reach is None:
                mask = _added(full) if additive else full
            else:  # transformers' models with layers of both kinds take a mask for each
                order = torch.arange(self.ids.shape[1], device=self.ids.device)
                near = full & ((order[:, None] - order[None, :]).abs() <= reach)
                kinds = {"full_attention": full, "sliding_attention": near}
                mask = {kind: _added(x) if additive else x for kind, x in kinds.items()}
        else:
            mask = self.positions != PADDING
        return {
            "input_ids": self.ids,
            "attention_mask": mask,
            "position_ids": self.positions.clamp(min=0) + position_offset,
        }

    def _attention_mask(self) -> Tensor:
        """(B, 1, S, S) bool, True if position i attends to position j.

        Padding attends to padding, so that every softmax has at least one entry.
        """
        if self._mask is None:
            starts = self.positions == 0
            # Padding at the end of a sample forms a document of its own.
            first_padding = (self.positions == PADDING) & (self.positions.roll(1, 1) != PADDING)
            document = (starts | first_padding).cumsum(1)  # (B, S), from 1 in every sample
            mask = document[:, :, None] == document[:, None, :]
            if self.causal or self.prefixes is not None:
                order = torch.arange(self.ids.shape[1], device=self.ids.device)
                earlier = order[None, :, None] >= order[None, None, :]
                if self.prefixes is not None:
                    number = (starts.reshape(-1).cumsum(0) - 1).view_as(starts)
                    inside = (self.positions < self.prefixes[number]) & (self.positions != PADDING)  # (B, S)
                    earlier = earlier | inside[:, None, :]
                mask = mask & earlier
            self._mask = mask[:, None]
        return self._mask

    def for_loss(self, qkv: QKV) -> QKV:
        """Projections (B, S, hidden) in the layout of the loss: (T, hidden) without padding if the batch is packed."""
        if not self._packed:
            return qkv
        flat = (x.flatten(0, 1) for x in qkv)
        return QKV(*flat) if self._valid is None else QKV(*(x.index_select(0, self._valid) for x in flat))

    def loss_arguments(self) -> Mapping[str, Any]:
        """Mask arguments of the loss."""
        arguments: dict[str, Any] = {"causal": self.causal, "prefix_lens": self.prefixes}
        if self._packed:
            return {**arguments, "cu_seqlens": self._cu_seqlens, "max_seqlen": self._longest}
        return {**arguments, "attention_mask": self.positions != PADDING}


def _added(mask: Tensor) -> Tensor:
    """A boolean mask as numbers that are added to the scores."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float16).min)
