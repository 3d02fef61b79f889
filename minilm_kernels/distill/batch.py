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
from minilm_kernels.packed.models import borders

from .packing import PADDING, Samples

_TOKENS_A_DOCUMENT, _FEWEST_DOCUMENTS = 64, 16  # room for borders: paragraphs have about 100 tokens


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

    A packed batch has two forms. `model_inputs` has the samples as rows, and a mask of B x S x S. `row_inputs` has one
    row of all documents and their borders, for models with packed attention: its valid tokens come first, and its
    padding makes further documents, so that all batches of a run have the same shapes.

    Args:
        samples: B samples of S tokens. Without packing, they are trimmed to the length of the longest.
        packed: True if a sample may contain several documents. The loss then takes the valid tokens of all samples,
            (T, hidden).
        causal: True to use the causal mask.
        prefixes: prefix lengths for the prefix mask, (documents,).

    Attributes:
        ids: token ids, (B, S) int64.
        positions: positions in the documents, (B, S) int64.
        packed: the argument.
        teacher: the teacher's query, key and value in the layout of the loss, if they are known.
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

        self.causal, self.packed = causal, packed
        self.ids = _tensor(samples.ids.astype(np.int64), device)
        self.positions = _tensor(samples.positions.astype(np.int64), device)
        self.prefixes = None if prefixes is None else _tensor(prefixes, device)  # (documents,)
        self._tokens, self._longest = int(valid.sum()), int(lengths.max())
        self._valid = None if valid.all() else _tensor(np.flatnonzero(valid), device)  # (T,)
        self._cu_seqlens = _tensor(np.append(starts, self._tokens).astype(np.int32), device)  # (N + 1,)
        self._mask: Tensor | None = None
        self.teacher: QKV | None = None
        if packed:
            order = np.argsort(~valid, kind="stable")
            padding = np.arange(len(valid) - self._tokens) % self._longest
            places = np.append(positions[valid], padding).astype(np.int64)  # (B * S,)
            bounds = np.append(np.flatnonzero(places == 0), len(places))
            bounds = _filled(bounds, len(places) // _TOKENS_A_DOCUMENT)
            self._row_ids = _tensor(samples.ids.ravel()[order].astype(np.int64)[None], device)
            self._row_positions = _tensor(places[None], device)
            self._borders = _tensor(bounds.astype(np.int32), device)

    def pinned(self) -> Batch:
        """The batch in pinned memory, from which `to` copies without waiting for the device."""
        return self._with_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
        if self.teacher is not None:
            moved.teacher = QKV(*(x.to(device, non_blocking=True) for x in self.teacher))
        return moved

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
        if self.packed or self.causal != causal_model or self.prefixes is not None:
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

    def row_inputs(self, position_offset: int, max_seqlen: int, *, causal_model: bool = False) -> dict[str, Any]:
        """Arguments for the forward of a model with packed attention (see `use_packed_attention`).

        Args:
            position_offset: position id of a document's first token.
            max_seqlen: a bound of the documents' tokens that is the same for all batches of a run.
            causal_model: True if the model itself attends to earlier tokens only.

        Raises:
            ValueError: a document has more tokens.
        """
        if self._longest > max_seqlen:
            raise ValueError(f"max_seqlen={max_seqlen}: a document of the batch has {self._longest} tokens")
        inputs = {
            "input_ids": self._row_ids,
            "position_ids": self._row_positions + position_offset,
            **borders(self._borders, min(max_seqlen, self.ids.shape[1])),
        }
        if self.prefixes is not None:
            missing = len(self._borders) - 1 - len(self.prefixes)
            inputs["prefix_lens"] = torch.nn.functional.pad(self.prefixes, (0, missing))
        elif self.causal != causal_model:
            inputs["is_causal"] = self.causal
        return inputs

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

    def for_loss(self, qkv: QKV, *, row: bool = False) -> QKV:
        """Projections in the layout of the loss: (T, hidden) without padding if the batch is packed.

        Args:
            qkv: projections of `model_inputs`, (B, S, hidden), or of `row_inputs`, (1, B * S, hidden).
            row: True for `row_inputs`.
        """
        if row:
            return QKV(*(x[0, : self._tokens] for x in qkv))
        if not self.packed:
            return qkv
        flat = (x.flatten(0, 1) for x in qkv)
        return QKV(*flat) if self._valid is None else QKV(*(x.index_select(0, self._valid) for x in flat))

    def loss_arguments(self) -> Mapping[str, Any]:
        """Mask arguments of the loss."""
        arguments: dict[str, Any] = {"causal": self.causal, "prefix_lens": self.prefixes}
        if self.packed:
            return {**arguments, "cu_seqlens": self._cu_seqlens, "max_seqlen": self._longest}
        return {**arguments, "attention_mask": self.positions != PADDING}


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _filled(bounds: np.ndarray, documents: int) -> np.ndarray:
    """Borders with empty documents at the end.

    Their number is `documents`, or the smallest power of two times it that is enough. torch.compile compiles again for
    every number, and kernels pass over empty documents.
    """
    count = max(documents, _FEWEST_DOCUMENTS)
    while count < len(bounds) - 1:
        count *= 2
    return np.append(bounds, np.full(count + 1 - len(bounds), bounds[-1]))


def _added(mask: Tensor) -> Tensor:
    """A boolean mask as numbers that are added to the scores."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float16).min)
