"""What is measured: self relations of teacher and student at the shapes that occur in MiniLM distillation."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Workload:
    """B sequences of S tokens, A relation heads of widths d_t and d_s, `relations` self relations in one loss."""

    B: int
    A: int
    S: int
    d_t: int
    d_s: int
    relations: int = 1
    mask: str = "none"  # none, half: every sequence has S/2 real tokens, causal
    dtype: str = "float32"
    device: str = "cpu"

    @classmethod
    def parse(cls, text: str, **options) -> Workload:
        """ "BxAxSxD_txD_s" as the command line gives it."""
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise ValueError(f"--shapes: expected BxAxSxD_txD_s such as 2x48x512x16x8, got {text!r}")
        B, A, S, d_t, d_s = (int(number) for number in match.groups())
        return cls(B, A, S, d_t, d_s, **options)

    @property
    def pairs(self) -> int:
        """Ordered pairs (i, j) over all heads, sequences and relations, visible or not."""
        return self.relations * self.B * self.A * self.S * self.S

    def tensors(self) -> tuple[list[Tensor], list[Tensor], dict]:
        """Teacher's and student's (B, S, A, D) tensors, views of fused projections, and the arguments of the mask."""
        generator = torch.Generator().manual_seed(0)

        def draw(width: int) -> list[Tensor]:
            fused = torch.randn(self.B, self.S, self.relations * self.A * width, generator=generator)
            fused = fused.to(self.device, getattr(torch, self.dtype))
            return [x.unflatten(-1, (self.A, width)) for x in fused.chunk(self.relations, -1)]

        masks: dict[str, dict] = {"none": {}, "causal": {"causal": True}}
        if self.mask == "half":
            real = torch.arange(self.S, device=self.device) < self.S // 2
            masks["half"] = {"attention_mask": real.expand(self.B, self.S)}
        return draw(self.d_t), draw(self.d_s), masks[self.mask]

    def shape(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name not in ("dtype", "device")}
