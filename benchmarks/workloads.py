"""What is measured: teacher's and student's heads at the shapes that occur in MiniLM distillation, under every mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Family(NamedTuple):
    """The heads of a published teacher and student pair, and the relations of its loss."""

    A: int
    d_t: int
    d_s: int
    relations: str
    about: str


FAMILIES: dict[str, Family] = {
    "v2-base": Family(48, 16, 8, "qq,kk,vv", "MiniLMv2, 768-wide teacher, 384-wide student"),
    "v2-large": Family(64, 16, 6, "qq,kk,vv", "MiniLMv2, 1024-wide teacher, 384-wide student"),
    "v2-large-768": Family(64, 16, 12, "qq,kk,vv", "MiniLMv2, 1024-wide teacher, 768-wide student"),
    "v1": Family(12, 64, 32, "qk,vv", "MiniLM, 768-wide teacher, 384-wide student"),
}

_PADDING = ("none", "half", "lengths", "left", "holes", "packed")
_ORDER = ("causal", "prefix")
MASKS = (*_PADDING, *_ORDER, *(f"{p}+{o}" for o in _ORDER for p in _PADDING[2:]))
"""half: every sequence has S/2 real tokens; lengths: padded on the right to drawn lengths, left: on the left; holes: a
fifth of the tokens hidden; packed: the sequences of `lengths` side by side, without padding; + causal or prefix."""

_NUMBERS = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)x(\d+)")
_NAMED = re.compile(r"([\w-]+):(\d+)x(\d+)")
_LETTERS = re.compile(r"[qkv]{2}(,[qkv]{2})*")


class Inputs(NamedTuple):
    """Arguments of a loss: heads by the names q, k and v, each (B, S, A, D), packed (T, A, D), relations, the mask."""

    teacher: dict[str, Tensor]
    student: dict[str, Tensor]
    relations: list[tuple[str, str]]
    mask: dict[str, Any]

    @property
    def heads(self) -> int:
        return next(iter(self.student.values())).shape[-2]

    @property
    def sequences(self) -> int:
        bounds = self.mask.get("cu_seqlens")
        return next(iter(self.student.values())).shape[0] if bounds is None else len(bounds) - 1

    def first(self, sequences: int) -> Inputs:
        """The same with the first sequences alone."""
        mask = dict(self.mask)
        end = sequences
        if "cu_seqlens" in mask:
            mask["cu_seqlens"] = mask["cu_seqlens"][: sequences + 1]
            end = int(mask["cu_seqlens"][-1])
        for name in ("attention_mask", "prefix_lens"):
            if name in mask:
                mask[name] = mask[name][:sequences]
        teacher, student = ({name: x[:end] for name, x in side.items()} for side in (self.teacher, self.student))
        return Inputs(teacher, student, self.relations, mask)

    def double(self) -> Inputs:
        teacher, student = ({name: x.double() for name, x in side.items()} for side in (self.teacher, self.student))
        return Inputs(teacher, student, self.relations, self.mask)

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for side in (self.teacher, self.student) for x in side.values())


@dataclass(frozen=True)
class Workload:
    """B sequences of S tokens, A relation heads of widths d_t and d_s; `relations` as in "qq,kk,vv" or "qk"."""

    B: int
    A: int
    S: int
    d_t: int
    d_s: int
    relations: str = "qq"
    mask: str = "none"
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if _LETTERS.fullmatch(self.relations) is None:
            raise ValueError(f"--relations: expected pairs of q, k and v such as qq,kk,vv, got {self.relations!r}")
        if self.mask not in MASKS:
            raise ValueError(f"--masks: expected one of {', '.join(MASKS)}, got {self.mask!r}")

    @classmethod
    def parse(cls, text: str, relations: str | None = None, **options: Any) -> Workload:
        """ "BxAxSxD_txD_s", or "FAMILY:BxS", which also says which relations, unless `relations` does."""
        if match := _NUMBERS.fullmatch(text):
            B, A, S, d_t, d_s = (int(number) for number in match.groups())
            usual = "qq"
        elif (match := _NAMED.fullmatch(text)) and match[1] in FAMILIES:
            A, d_t, d_s, usual, _ = FAMILIES[match[1]]
            B, S = int(match[2]), int(match[3])
        else:
            raise ValueError(
                f"--shapes: expected BxAxSxD_txD_s such as 2x48x512x16x8, or FAMILY:BxS with a family of "
                f"{', '.join(FAMILIES)}, got {text!r}"
            )
        if 0 in (B, A, S, d_t, d_s):
            raise ValueError(f"--shapes: expected sizes of 1 or more, got {text!r}")
        return cls(B, A, S, d_t, d_s, relations or usual, **options)

    def with_batch(self, B: int) -> Workload:
        return replace(self, B=B)

    def shape(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("dtype", "device")}

    @property
    def count(self) -> int:
        """How many relations."""
        return self.relations.count(",") + 1

    @property
    def pairs(self) -> int:
        """Ordered pairs (i, j) over all heads, sequences and relations, visible or not; packed: of each sequence."""
        if "packed" in self.mask:
            return self.count * self.A * int(self.lengths().square().sum())
        return self.count * self.A * self.B * self.S**2

    @property
    def visible_pairs(self) -> int:
        """Those of the pairs that the loss is defined on."""
        real = self.lengths() if "packed" in self.mask else self._real().sum(1)
        if "causal" in self.mask:
            seen = real * (real + 1) // 2
        elif "prefix" in self.mask:
            inside = real // 2 if "packed" in self.mask else self._real()[:, : self.S // 2].sum(1)
            seen = inside.square() + (real * (real + 1) - inside * (inside + 1)) // 2
        else:
            seen = real.square()
        return self.count * self.A * int(seen.sum())

    def lengths(self) -> Tensor:
        """(B,) lengths of documents: log-normal with median 0.4 S and sigma 0.7, cut to [min(8, S), S].

        An assumption about text that is cut at S tokens, not a measurement of a corpus.
        """
        draw = torch.randn(self.B, generator=torch.Generator().manual_seed(1))
        return (0.4 * self.S * (0.7 * draw).exp()).round().long().clamp(min(8, self.S), self.S)

    def inputs(self, seed: int = 0) -> Inputs:
        """Random heads, equal for equal seeds: views of fused projections, as models lay them out."""
        generator = torch.Generator(self.device).manual_seed(seed)
        names = sorted(set(self.relations) - {","})
        packed = "packed" in self.mask
        leading = (int(self.lengths().sum()),) if packed else (self.B, self.S)

        def draw(width: int) -> dict[str, Tensor]:
            fused = torch.randn(
                *leading,
                len(names) * self.A * width,
                generator=generator,
                device=self.device,
                dtype=torch.float32 if self.device == "cpu" else getattr(torch, self.dtype),
            ).to(getattr(torch, self.dtype))
            return {
                n: x.unflatten(-1, (self.A, width)) for n, x in zip(names, fused.chunk(len(names), -1), strict=True)
            }

        relations = [(pair[0], pair[1]) for pair in self.relations.split(",")]
        return Inputs(draw(self.d_t), draw(self.d_s), relations, self._mask())

    def _mask(self) -> dict[str, Any]:
        mask: dict[str, Any] = {}
        if "packed" in self.mask:
            bounds = torch.nn.functional.pad(self.lengths().cumsum(0), (1, 0))
            mask = {"cu_seqlens": bounds.int().to(self.device), "max_seqlen": self.S}
        elif self.mask.partition("+")[0] not in ("none", *_ORDER):
            mask["attention_mask"] = self._real().to(self.device)
        if "causal" in self.mask:
            mask["causal"] = True
        if "prefix" in self.mask:
            prefix = self.lengths() // 2 if "packed" in self.mask else torch.full((self.B,), self.S // 2)
            mask["prefix_lens"] = prefix.to(self.device)
        return mask

    def _real(self) -> Tensor:
        """(B, S) bool: the tokens that take part, of inputs that are not packed."""
        position = torch.arange(self.S)
        if "half" in self.mask:
            return (position < max(1, self.S // 2)).expand(self.B, self.S)
        if "lengths" in self.mask:
            return position < self.lengths()[:, None]
        if "left" in self.mask:
            return position >= self.S - self.lengths()[:, None]
        if "holes" in self.mask:
            real = torch.rand(self.B, self.S, generator=torch.Generator().manual_seed(2)) < 0.8
            real[:, 0] = True
            return real
        return torch.ones(self.B, self.S, dtype=torch.bool)


def parse_all(
    shapes: Sequence[str], masks: Sequence[str], dtypes: Sequence[str], relations: Sequence[str | None], device: str
) -> list[Workload]:
    """Every combination, the shapes outermost: the first shape is done before the second begins."""
    return [
        Workload.parse(shape, pairs, mask=mask, dtype=dtype, device=device)
        for shape in shapes
        for dtype in dtypes
        for mask in masks
        for pairs in relations
    ]
