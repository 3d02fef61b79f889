"""Random calls of relation_kl_multi: `draw` generates one, `judge` checks its results."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minilm_kernels.relation.api import relation_kl_multi
from tests.relation.cases import error

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTHS = ((16, 8), (16, 8), (64, 32), (12, 6), (8, 8), (24, 20), (7, 5), (1, 1), (33, 17), (64, 64), (8, 128))
MASKS = (
    "none", "right", "left", "holes", "causal", "causal-holes", "prefix", "prefix-holes",
    "packed", "packed-causal", "packed-prefix",
)  # fmt: skip
REDUCTIONS = ("sequence", "token", "sum", "none")
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 66, 80, 95, 96, 97, 112, 127, 128, 129, 130)
LAYOUTS = ("contiguous", "contiguous", "heads first", "slice", "odd slice", "strided features", "expanded")

_UNIT = 2.0**-24  # largest relative error of one rounding to float32


@dataclass
class Call:
    """Arguments of one call of relation_kl_multi, as backends get them."""

    label: str
    dtype: str
    mask: str
    teacher: dict[str, Tensor]
    student: dict[str, Tensor]
    relations: list[tuple[str, str]]
    kwargs: dict
    reduction: str
    gradient: bool
    spread: float
    upstream: Tensor | None
    row_shape: tuple[int, ...]

    def run(self, backend: str, double: bool = False) -> tuple[Tensor, list[Tensor]]:
        teacher = {name: x.double() if double else x for name, x in self.teacher.items()}
        student = {name: (x.double() if double else x).detach() for name, x in self.student.items()}
        if self.gradient:
            student = {name: x.requires_grad_() for name, x in student.items()}
        value = relation_kl_multi(
            teacher, student, self.relations, reduction=self.reduction, backend=backend, **self.kwargs
        )
        if self.gradient:
            value.backward(torch.ones_like(value) if self.upstream is None else self.upstream.to(value))
        return value.detach(), [x.grad for x in student.values() if x.grad is not None]


def draw(seed: int, only: dict[str, Any] | None = None) -> Call:
    """The random call of a seed. `only` fixes some of the random choices.

    Two choices are never random: `rows`, the share of rows that count, and `groups`, the numbers of query heads per key
    head of teacher and student.
    """
    dice, only = random.Random(seed), only or {}
    generator = torch.Generator().manual_seed(seed)

    def pick(name: str, choices):
        drawn = dice.choice(choices)
        return only.get(name, drawn)

    dtype = pick("dtype", tuple(DTYPES))
    teacher_dtype = dtype if dice.random() < 0.9 else dice.choice(tuple(DTYPES))
    widths = pick("widths", WIDTHS)
    mask = pick("mask", MASKS)
    reduction = pick("reduction", REDUCTIONS)
    batch, heads = pick("batch", (1, 2, 3)), pick("heads", (1, 2, 3, 4))
    length = pick("length", (*LENGTHS, dice.randint(1, 130)))
    spread = pick("spread", (1.0, 1.0, 1.0, 1.0, 0.05, 3.0, 7.0))
    layout = pick("layout", LAYOUTS)
    relations = pick("relations", ("q", "q", "q", "qk", "qk", "qkv", "all"))
    gradient = pick("gradient", (True, True, True, True, False))

    kwargs, token_shape = _mask(mask, batch, length, dice, generator)
    if dice.random() < 0.1:
        kwargs |= {"teacher_scale": dice.uniform(-0.3, 0.5), "student_scale": dice.uniform(-0.3, 0.5)}
    pairs = {
        "q": [("q", "q")],
        "qk": [("q", "k")],
        "qkv": [("q", "q"), ("k", "k"), ("v", "v")],
        "all": [("q", "k"), ("v", "v"), ("k", "q"), ("q", "q")],
    }[relations]
    used = list(dict.fromkeys(name for pair in pairs for name in pair))
    queries = {query for query, _ in pairs}

    def side(width: int, kind: str, group: int) -> dict[str, Tensor]:
        heads_of = {name: heads if name in queries else heads // group for name in used}
        return {
            name: _tensor(token_shape, heads_of[name], width, DTYPES[kind], spread, layout, generator) for name in used
        }

    group_t, group_s = only.get("groups", (1, 1))
    teacher, student = side(widths[0], teacher_dtype, group_t), side(widths[1], dtype, group_s)
    if "rows" in only:
        kwargs["query_mask"] = torch.rand(token_shape, generator=generator) < only["rows"]
    if "attention_mask" in kwargs:
        hidden = kwargs["attention_mask"] == 0
        for x in (*teacher.values(), *student.values()):
            if layout != "expanded":
                x[hidden] = torch.nan
    rows = (len(pairs), *token_shape[:-1], heads, token_shape[-1])
    upstream = None
    if dice.random() < 0.5:
        shape = rows if reduction == "none" else (len(pairs),)
        upstream = torch.randn(shape, generator=generator)
    label = (
        f"seed {seed}: {dtype}{'' if teacher_dtype == dtype else f' of {teacher_dtype}'}, {widths}, {mask}, "
        f"{reduction}, B {batch}, A {heads}, S {length}, {relations}, {layout}, spread {spread}"
        f"{'' if gradient else ', no gradient'}"
    )
    return Call(label, dtype, mask, teacher, student, pairs, kwargs, reduction, gradient, spread, upstream, rows)


def _mask(mask: str, batch: int, length: int, dice: random.Random, generator) -> tuple[dict, tuple[int, ...]]:
    lengths = [dice.randint(0, length) for _ in range(batch)]
    lengths[dice.randrange(batch)] = length
    kwargs: dict = {}
    if mask.startswith("packed"):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        kwargs["cu_seqlens"] = bounds
        if dice.random() < 0.5:
            kwargs["max_seqlen"] = length + dice.randint(0, 40)
        token_shape: tuple[int, ...] = (int(bounds[-1]),)
    else:
        token_shape = (batch, length)
        position = torch.arange(length)
        right = position < torch.tensor(lengths)[:, None]
        if "holes" in mask:
            kwargs["attention_mask"] = torch.rand(batch, length, generator=generator) < 0.7
        elif mask in ("right", "left"):
            kwargs["attention_mask"] = right.flip(1) if mask == "left" else right
    if "prefix" in mask:
        kwargs["prefix_lens"] = torch.tensor([dice.randint(-3, length + 10) for _ in range(batch)])
    elif "causal" in mask:
        kwargs["causal"] = True
    return kwargs, token_shape


def _tensor(token_shape, heads: int, width: int, dtype, spread: float, layout: str, generator) -> Tensor:
    """A random tensor (*token_shape, heads, width) whose strides follow `layout`."""

    def new(*shape: int) -> Tensor:
        return (spread * torch.randn(shape, generator=generator)).to(dtype)

    if layout == "heads first":
        return new(*token_shape[:-1], heads, token_shape[-1], width).transpose(-2, -3)
    if layout == "slice":  # a slice of a fused projection, as in models
        return new(*token_shape, 3, heads, width)[..., 1, :, :]
    if layout == "odd slice":  # no alignment
        return new(*token_shape, heads * width + 3)[..., 1 : 1 + heads * width].unflatten(-1, (heads, width))
    if layout == "strided features":
        return new(*token_shape, heads, 2 * width)[..., ::2]
    if layout == "expanded":  # the same tokens in every sequence
        return (
            new(*token_shape[1:], heads, width).expand(*token_shape, heads, width)
            if len(token_shape) == 2
            else new(*token_shape, heads, width)
        )
    return new(*token_shape, heads, width)


@cache
def _dense_errors(dtype: str, widths: tuple[int, int], length: int, cross: bool, spread: float) -> tuple[float, float]:
    """The errors of rows and gradients of the plain dense loss, computed in `dtype`, against float64."""
    generator = torch.Generator().manual_seed(7)
    results = []
    drawn = [
        (spread * torch.randn(6, 3, length, w, generator=generator)).to(DTYPES[dtype]) for w in widths for _ in "qk"
    ]
    for kind in (DTYPES[dtype], torch.float64):
        q_t, k_t, q_s, k_s = (x.detach().clone().to(kind) for x in drawn)
        leaves = [x.requires_grad_() for x in ((q_s, k_s) if cross else (q_s,))]
        scores = [(q_t, k_t if cross else q_t, widths[0]), (leaves[0], leaves[-1], widths[1])]
        log_t, log_s = ((q @ k.transpose(-1, -2) * w**-0.5).log_softmax(-1) for q, k, w in scores)
        rows = (log_t.exp() * (log_t - log_s)).sum(-1)
        rows.sum().backward()
        results.append((rows.detach(), [x.grad for x in leaves]))
    (rows, grads), (exact, exact_grads) = results
    return error(rows, exact), max(map(error, grads, exact_grads))


def judge(call: Call, backend: str) -> tuple[float, list[str]]:
    """The largest error relative to its tolerance (README.md), and a message for each wrong result."""
    value, grads = call.run(backend)
    expected, expected_grads = call.run("reference", double=True)
    widths = tuple(next(iter(side.values())).shape[-1] for side in (call.teacher, call.student))
    cross = any(a != b for a, b in call.relations)
    positions = next(iter(call.student.values())).shape[-3]
    rows, gradient = _dense_errors(call.dtype, widths, min(131, max(23, positions)), cross, call.spread)
    _, plain = call.run("torch")  # computed in float32 without a kernel; gradients are rounded to the student's dtype

    number = math.prod(call.row_shape)
    rows_at_once = {"sum": number, "none": number**0.5}.get(call.reduction, 1.0)
    checks = [("value", value, expected, 2 * rows + 2 * _UNIT, 3.4 * _UNIT * rows_at_once)]
    upstream = 1.0 if call.upstream is None else call.upstream.abs().max().item()
    bits = 1.5 * call.spread**2 * widths[1] ** 0.5  # size of a self score
    for k, (got, exact, other) in enumerate(zip(grads, expected_grads, plain, strict=True)):
        allowed = 2 * max(gradient, error(other, exact)) + torch.finfo(DTYPES[call.dtype]).eps
        floor = (17 + 2.1 * bits) * _UNIT * call.spread * exact.numel() ** 0.5 * upstream
        if call.reduction in ("sequence", "token"):
            floor /= call.row_shape[-2]
        checks.append((f"gradient {k}", got, exact, allowed, 0.0 if call.spread == 1.0 else floor))
    worst, wrong = 0.0, []
    for name, got, exact, relative, floor in checks:
        most = relative + floor / max(exact.norm().item(), 1e-300)
        part = error(got, exact) / most
        worst = max(worst, part) if part == part else float("inf")
        if not part <= 1:
            wrong.append(f"{name}: error {error(got, exact):.2e}, allowed {most:.2e}")
    return worst, wrong


def parsed(fixed: Sequence[str]) -> dict[str, Any]:
    """The argument `only` of `draw`, from words such as "length=64"."""
    return {name: _parse(value) for name, value in (text.split("=", 1) for text in fixed)}


def _parse(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if text in ("True", "False"):
        return text == "True"
    return tuple(int(x) for x in text.split(",")) if "," in text else text
