"""The inputs of a measurement: teacher and student heads at the shapes of MiniLM distillation, under every mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Heads = dict[str, Tensor]
Loss = Callable[[Heads, Heads], Tensor]  # teacher's and student's heads -> scalar


# Published teachers and students: relation heads A, their widths d_t and d_s, and the relations of the loss.
FAMILIES = {
    "v2-base": (48, 16, 8, "qq,kk,vv"),  # MiniLMv2, 768-wide teacher, 384-wide student
    "v2-large": (64, 16, 6, "qq,kk,vv"),  # MiniLMv2, 1024-wide teacher, 384-wide student
    "v2-large-768": (64, 16, 12, "qq,kk,vv"),  # MiniLMv2, 1024-wide teacher, 768-wide student
    "v1": (12, 64, 32, "qk,vv"),  # MiniLM, 768-wide teacher, 384-wide student
}

_PADDING = ("none", "half", "lengths", "left", "holes", "packed")
_ORDER = ("causal", "prefix")
MASKS = (*_PADDING, *_ORDER, *(f"{p}+{o}" for o in _ORDER for p in _PADDING[2:]))
"""half: S/2 valid tokens in every sequence; lengths: random lengths, padded on the right; left: padded on the left;
holes: a fifth of the tokens is masked; packed: the sequences of `lengths` without padding. causal and
prefix also combine with the last four of these, as in "left+causal"."""

_NUMBERS = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)x(\d+)")
_NAMED = re.compile(r"([\w-]+):(\d+)x(\d+)")
_RELATIONS = re.compile(r"[qkv]{2}(,[qkv]{2})*")


class Inputs(NamedTuple):
    """Arguments of a loss; heads are named q, k and v and have the shape (B, S, A, D), or (T, A, D) if packed."""

    teacher: Heads
    student: Heads
    relations: list[tuple[str, str]]
    mask: dict[str, Any]

    @property
    def example(self) -> Tensor:
        """One of the student tensors, to read shape, dtype and device from."""
        return next(iter(self.student.values()))

    @property
    def heads(self) -> int:
        return self.example.shape[-2]

    @property
    def widths(self) -> tuple[int, int]:
        """(D_t, D_s)."""
        return next(iter(self.teacher.values())).shape[-1], self.example.shape[-1]

    @property
    def sequences(self) -> int:
        bounds = self.mask.get("cu_seqlens")
        return self.example.shape[0] if bounds is None else len(bounds) - 1

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same inputs with a function applied to every head tensor."""
        teacher, student = ({n: function(x) for n, x in heads.items()} for heads in (self.teacher, self.student))
        return self._replace(teacher=teacher, student=student)

    def first(self, sequences: int) -> Inputs:
        """The first sequences alone."""
        mask = {n: x[:sequences] if n in ("attention_mask", "prefix_lens") else x for n, x in self.mask.items()}
        end = sequences
        if "cu_seqlens" in mask:
            mask["cu_seqlens"] = mask["cu_seqlens"][: sequences + 1]
            end = int(mask["cu_seqlens"][-1])
        return self.map(lambda x: x[:end])._replace(mask=mask)

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for heads in (self.teacher, self.student) for x in heads.values())


@dataclass(frozen=True)
class Workload:
    """Shape and mask of a loss: B sequences of S tokens, A relation heads of widths d_t and d_s, and the relations."""

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
        if _RELATIONS.fullmatch(self.relations) is None:
            raise ValueError(f"--relations: expected relations of q, k and v such as qq,kk,vv, got {self.relations!r}")
        if self.mask not in MASKS:
            raise ValueError(f"--masks: expected one of {', '.join(MASKS)}, got {self.mask!r}")

    @classmethod
    def parse(cls, text: str, relations: str | None = None, **options: Any) -> Workload:
        """Read "BxAxSxD_txD_s", or "FAMILY:BxS", which also sets the relations unless `relations` is given."""
        if match := _NUMBERS.fullmatch(text):
            B, A, S, d_t, d_s = map(int, match.groups())
            default = "qq"
        elif (match := _NAMED.fullmatch(text)) and match[1] in FAMILIES:
            A, d_t, d_s, default = FAMILIES[match[1]]
            B, S = int(match[2]), int(match[3])
        else:
            raise ValueError(
                f"--shapes: expected BxAxSxD_txD_s such as 2x48x512x16x8, or FAMILY:BxS with FAMILY one of "
                f"{', '.join(FAMILIES)}, got {text!r}"
            )
        if 0 in (B, A, S, d_t, d_s):
            raise ValueError(f"--shapes: expected sizes of 1 or more, got {text!r}")
        return cls(B, A, S, d_t, d_s, relations or default, **options)

    def with_batch(self, B: int) -> Workload:
        return replace(self, B=B)

    def shape(self) -> dict[str, Any]:
        """The `shape` of a record."""
        return {name: value for name, value in asdict(self).items() if name not in ("dtype", "device")}

    @property
    def pairs(self) -> int:
        """Number of ordered pairs within sequences, of all heads and relations, including masked pairs."""
        squares = int(self.lengths().square().sum()) if "packed" in self.mask else self.B * self.S**2
        return (self.relations.count(",") + 1) * self.A * squares

    @property
    def visible_pairs(self) -> int:
        """Number of pairs that are not masked."""
        valid = self._valid()
        n = valid.sum(1)
        if "causal" in self.mask:
            seen = n * (n + 1) // 2
        elif "prefix" in self.mask:
            inside = n // 2 if "packed" in self.mask else valid[:, : self.S // 2].sum(1)
            seen = inside.square() + (n * (n + 1) - inside * (inside + 1)) // 2
        else:
            seen = n.square()
        return (self.relations.count(",") + 1) * self.A * int(seen.sum())

    def lengths(self) -> Tensor:
        """(B,) document lengths: log-normal with median 0.4 S and sigma 0.7, clipped to [min(8, S), S].

        This is an assumption about text that is truncated at S tokens, not a measurement of a corpus.
        """
        draw = torch.randn(self.B, generator=torch.Generator().manual_seed(1))
        return (0.4 * self.S * (0.7 * draw).exp()).round().long().clamp(min(8, self.S), self.S)

    def inputs(self, seed: int = 0) -> Inputs:
        """Random heads, as strided views of one fused projection; equal seeds give equal inputs."""
        generator = torch.Generator(self.device).manual_seed(seed)
        names = sorted(set(self.relations) - {","})
        tokens = (int(self.lengths().sum()),) if "packed" in self.mask else (self.B, self.S)
        dtype = getattr(torch, self.dtype)

        def draw(width: int) -> Heads:
            size = (*tokens, len(names) * self.A * width)
            drawn_as = torch.float32 if self.device == "cpu" else dtype
            fused = torch.randn(size, generator=generator, device=self.device, dtype=drawn_as).to(dtype)
            parts = fused.chunk(len(names), -1)
            return {name: x.unflatten(-1, (self.A, width)) for name, x in zip(names, parts, strict=True)}

        relations = [(pair[0], pair[1]) for pair in self.relations.split(",")]
        return Inputs(draw(self.d_t), draw(self.d_s), relations, self._mask())

    def _mask(self) -> dict[str, Any]:
        mask: dict[str, Any] = {}
        if "packed" in self.mask:
            bounds = pad(self.lengths().cumsum(0), (1, 0))
            mask = {"cu_seqlens": bounds.int().to(self.device), "max_seqlen": self.S}
        elif self.mask.partition("+")[0] not in ("none", *_ORDER):
            mask["attention_mask"] = self._valid().to(self.device)
        if "causal" in self.mask:
            mask["causal"] = True
        if "prefix" in self.mask:
            prefix = self.lengths() // 2 if "packed" in self.mask else torch.full((self.B,), self.S // 2)
            mask["prefix_lens"] = prefix.to(self.device)
        return mask

    def _valid(self) -> Tensor:
        """(B, S) bool: the valid tokens; packed sequences count as padded on the right."""
        position = torch.arange(self.S).expand(self.B, self.S)
        padding = self.mask.partition("+")[0]
        if padding == "half":
            return position < max(1, self.S // 2)
        if padding in ("lengths", "packed"):
            return position < self.lengths()[:, None]
        if padding == "left":
            return position >= self.S - self.lengths()[:, None]
        if padding == "holes":
            drawn = torch.rand(self.B, self.S, generator=torch.Generator().manual_seed(2))
            return (drawn < 0.8) | (position == 0)
        return position >= 0


def parse_all(
    shapes: Sequence[str], masks: Sequence[str], dtypes: Sequence[str], relations: Sequence[str | None], device: str
) -> list[Workload]:
    """Every combination, ordered by shape."""
    combinations = product(shapes, dtypes, masks, relations)
    return [Workload.parse(shape, r, mask=mask, dtype=dtype, device=device) for shape, dtype, mask, r in combinations]
