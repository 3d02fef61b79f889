"""Random calls of every backend, compared with the float64 reference: `make random`.

    python -m tests.relation.random_cases --cases 100000 --backends cuda triton cpu torch
    python -m tests.relation.random_cases --backends cuda --seed 12345     # a single case again

A case is a call by one backend, a function of its seed. `cuda` runs in the emulated thread block and `triton` in
Triton's interpreter, so that no GPU is needed. All backends of a seed are compared with one result of the reference.
`cuda` computes every seed, the others the multiples of a number (`EVERY`): 100 000 cases are 70 529 of `cuda`, 17 633
of `cpu`, 10 076 of `torch` and 1 764 of `triton`. CUDA kernels have most of the code that depends on shapes and
machines, and no other test in which so many run; the CPU library is the next; `torch` has one path for all shapes; a
case of the interpreter takes as long as twenty of the emulation.

Most calls are short, since mistakes are made at the borders of tiles: with up to 33 tokens, a call has one to three
tiles of 16, full ones and others. One call in seven has up to 100 tokens, a second strip or block of 64 rows that is
not full, and one in 25 up to 150, three of them, in several rounds. The emulated GPUs are of compute capability 9.0 or
10.0, and of several sizes: with little shared memory, blocks are of 16 rows and windows short, so that short sequences
have several of them.

A run that was interrupted goes on where it stopped, if neither the sources nor the options have changed; build/random
has the seeds that are done. An emulated kernel that ends its process is a wrong case, and the run goes on behind it.

The contract allows twice the error of dense PyTorch in the same dtypes, plus one rounding of the result. Dense PyTorch
is run on the inputs of the case, and on full batches with its widths, scales, dtypes and distribution: the error on few
rows may be small by chance. The batches have its length and short ones, since rows with few visible keys exist under
every mask. The errors of single rows, in the Euclidean norm as in the contract, may be twice the sum of the norm of the
dense errors on the inputs and the largest error of a row in the batches. The error of a reduced loss may be twice the
largest error of a dense row times the sum of the rows' weights; that of a token's gradient twice the sum of the largest
error of a dense token on the inputs and of one in the batches, times the largest weight in its sequence: the largest
error of few tokens is itself a matter of chance. To this, one rounding is added.

A GPU's exponentials have a relative error of up to u = 2^-22 (ex2.approx), several roundings, which the emulation makes
as well. If few keys share a row, such errors do not average out. A sum of exponentials then errs by u at most, and
q = E / l by 2 u q to first order, as p does. With row weights w, a token's gradient may therefore have a further error
of 2 u scale Σ_j (w_i (q + p)_ij + w_j (q + p)_ji) |x_j|, feature by feature, and likewise in cross relations.

Dense PyTorch's error depends on the order in which it adds the features, which it is free to choose: with scores of 30
and more, it varies by a factor of eight (seed 2380). So before a case is wrong, the dense errors on its inputs are the
largest of several orders.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from ctypes import CDLL
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import torch
from torch import Tensor

from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation.backends import native
from minilm_kernels.relation.masks import Mask
from tests.relation.backends import cuda
from tests.relation.cases import Case

ROOT = Path(__file__).parents[2]
EVERY = {"cuda": 1, "triton": 40, "cpu": 4, "torch": 7}  # a backend computes the multiples of its number
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMMON = ((16, 8), (16, 6), (16, 12), (64, 32))
_WIDTHS = (*_COMMON, *_COMMON, (12, 6), (32, 16), (1, 1), (7, 17), (24, 40), (3, 64))
_SCALES = ((None, None), (None, None), (None, None), (0.2, None), (None, -0.3), (-0.3, 0.2))  # teacher, student
# Share, border lengths and the range of other lengths.
_SIZES = (
    (0.82, (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33), (1, 40)),
    (0.14, (47, 49, 63, 64, 65, 79, 81, 95, 97), (41, 100)),
    (0.04, (111, 113, 127, 128, 129, 145), (101, 150)),
)
_SHORTEST = 23  # length of the batches whose dense errors are computed for every distribution
_SHORT = 40  # the longest sequence in Triton's interpreter
_CAPABILITIES = (90, 100)  # compute capability 10.0 has other kernels, with packed arithmetic
_SMEM = ((232448, 233472), (232448, 30000))  # bytes of shared memory of a block and of an SM
_LITTLE_SMEM = (16384, 16384)  # for long sequences of narrow heads, which then do not fit
_FEW_WARPS = 0.85  # the share of calls of row-wise kernels on a GPU in which a block has few warps
_POISON = (math.nan, math.inf, -math.inf, 3e38)


_EXPONENTIAL_ERROR = 2.0**-22  # relative, of ex2.approx
_ORDERS = 16
_REPORT_SECONDS = 10
_CRASHES = [-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGFPE, -signal.SIGILL]


@dataclass(frozen=True)
class Distribution:
    """Everything on which the error of dense PyTorch depends, apart from the length."""

    dtypes: tuple[torch.dtype, torch.dtype]
    widths: tuple[int, int]
    spread: float
    scales: tuple[float | None, float | None]
    cross: bool

    def draw(self, tokens: tuple[int, ...], heads: int, groups: tuple[int, int], seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def tensor(width: int, group: int, dtype: torch.dtype) -> Tensor:
            return (self.spread * torch.randn(*tokens, heads // group, width, generator=generator)).to(dtype)

        tensors: list[Tensor | None] = []
        for width, group, dtype in zip(self.widths, groups, self.dtypes, strict=True):
            tensors += [tensor(width, 1, dtype), tensor(width, group, dtype) if self.cross else None]
        names = ("teacher_scale", "student_scale")
        kwargs = {name: scale for name, scale in zip(names, self.scales, strict=True) if scale is not None}
        return Case(tuple(tensors), kwargs)


@dataclass(frozen=True)
class Drawn:
    """One random call: clean inputs, inputs with poisoned padding, and the weights of its result."""

    distribution: Distribution
    case: Case
    poisoned: Case
    reduction: str
    upstream: Tensor
    mask: Mask
    about: str


def draw(seed: int) -> Drawn:
    """The case of a seed. In those of Triton's interpreter, bfloat16 becomes float16, and sequences are short."""
    choose = random.Random(seed)
    interpreted = seed % EVERY["triton"] == 0
    dtypes = tuple(choose.choice(_DTYPES) for _ in range(2)) if choose.random() < 0.2 else (choose.choice(_DTYPES),) * 2
    if interpreted:
        dtypes = tuple(torch.float16 if dtype == torch.bfloat16 else dtype for dtype in dtypes)
    cross = choose.random() < 0.4
    widths = choose.choice(_WIDTHS)
    scales = choose.choice(_SCALES)
    distribution = Distribution(dtypes, widths, choose.choice((0.1, 1.0, 1.0, 3.0)), scales, cross)
    heads = choose.choice((1, 1, 1, 2, 2, 3, 4))
    groups = tuple(choose.choice([g for g in (1, 2, 3, 4) if heads % g == 0]) for _ in range(2)) if cross else (1, 1)
    _, borders, others = choose.choices(_SIZES, [share for share, _, _ in _SIZES])[0]
    longest = choose.choice(borders) if choose.random() < 0.6 else choose.randint(*others)
    longest = min(longest, _SHORT) if interpreted else longest
    sequences = choose.choice((1, 1, 2, 3))
    lengths = [choose.choice((longest, choose.randint(0, longest))) for _ in range(sequences)]
    kwargs: dict = {}
    padding = choose.choice(("none", "right", "left", "holes", "packed"))
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(longest)
    if padding == "packed":
        kwargs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
        if choose.random() < 0.5:
            kwargs["max_seqlen"] = max(lengths) + choose.randint(0, 9)
    elif padding != "none":
        valid = positions < torch.tensor(lengths)[:, None]
        if padding == "left":
            valid = valid.flip(1)
        if padding == "holes":
            valid = torch.rand(sequences, longest, generator=generator) < choose.choice((0.1, 0.5, 0.9))
        kwargs["attention_mask"] = valid if choose.random() < 0.5 else valid.long() * 7
    order = choose.choice(("bidirectional", "bidirectional", "causal", "prefix"))
    if order == "causal":
        kwargs["causal"] = True
    if order == "prefix":
        kwargs["prefix_lens"] = torch.tensor([choose.randint(-1, longest + 2) for _ in range(sequences)])
    tokens = (sum(lengths),) if padding == "packed" else (sequences, longest)
    if choose.random() < 0.3:
        kwargs["query_mask"] = torch.rand(tokens, generator=generator) < choose.choice((0.0, 0.3, 0.9))
    clean = distribution.draw(tokens, heads, groups, seed)
    clean = replace(clean, kwargs=clean.kwargs | kwargs)
    mask = Mask(tokens, torch.device("cpu"), **kwargs)
    reduction = choose.choice(REDUCTIONS)
    shape = clean.row_shape() if reduction == "none" else ()
    upstream = torch.randn(shape, generator=generator) if choose.random() < 0.5 else torch.ones(shape)
    poisoned = _poisoned(clean, mask, choose.choice(_POISON)) if choose.random() < 0.7 else clean
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
    about = (
        f"{'cross' if cross else 'self'} {widths} {names}, lengths {lengths} of {longest}, {heads} heads {groups}, "
        f"{padding} {order}{' query_mask' if 'query_mask' in kwargs else ''}, scales {scales}, "
        f"spread {distribution.spread}, {reduction}"
    )
    return Drawn(distribution, clean, poisoned, reduction, upstream, mask, about)


def _poisoned(case: Case, mask: Mask, value: float) -> Case:
    """The same call with other values where they must not matter: padding, and queries of rows that do not count."""
    used = (mask.counted, mask.valid) if case.tensors[1] is not None else (mask.valid, mask.valid)
    tensors = (x if x is None else x.where(used[n % 2][..., None, None], value) for n, x in enumerate(case.tensors))
    return replace(case, tensors=tuple(tensors))


def _dense(case: Case, visible: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rows and the gradients of tokens of the loss as eager PyTorch computes it, each model in its own dtype.

    `visible`: bool, broadcasts with the scores (B, A, S, S).
    """
    query_t, key_t, query_s, key_s = case.tensors
    leaves = [x.detach().requires_grad_() for x in (query_s, key_s) if x is not None]
    log_t = _log_relation(query_t, query_t if key_t is None else key_t, case.kwargs.get("teacher_scale"), visible)
    log_s = _log_relation(leaves[0], leaves[-1], case.kwargs.get("student_scale"), visible)
    rows = (log_t.exp() * (log_t - log_s).masked_fill(~visible, 0.0)).sum(-1)
    rows.sum().backward()
    return rows.detach().double(), [x.grad.double() for x in leaves]


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Tokens of (B, S, A, D) or (T, A, D) as (B, heads, S, D). Packed tokens are a batch of one sequence."""
    x = x.repeat_interleave(heads // x.shape[-2], dim=-2)
    return (x[None] if x.dim() == 3 else x).transpose(1, 2)


def _log_relation(query: Tensor, key: Tensor, scale: float | None, visible: Tensor) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    has_keys = visible.any(-1, keepdim=True)
    scores = _by_head(query, query.shape[-2]) @ _by_head(key, query.shape[-2]).mT * scale
    return scores.masked_fill(~visible & has_keys, -math.inf).masked_fill(~has_keys, 0.0).log_softmax(-1)


def _errors_of_exponentials(drawn: Drawn, weights: Tensor) -> list[Tensor]:
    """The errors of a token's gradients, queries and keys, that exponentials may cause: (B, S, A) or (T, A)."""
    visible = drawn.mask.dense()[:, None]
    case = drawn.case.to(torch.float64)
    query_t, key_t, query, key = case.tensors
    heads, own = query.shape[-2], key is None
    scale = case.kwargs.get("student_scale")
    log_t = _log_relation(query_t, query_t if own else key_t, case.kwargs.get("teacher_scale"), visible)
    log_s = _log_relation(query, query if own else key, scale, visible)
    shares = (log_t.exp() + log_s.exp()).masked_fill(~visible, 0.0) * weights.view(log_s.shape[:-1])[..., None]
    factor = 2 * _EXPONENTIAL_ERROR * abs(query.shape[-1] ** -0.5 if scale is None else scale)
    of_query = shares @ _by_head(query if own else key, heads).abs()
    of_key = shares.mT @ _by_head(query, heads).abs()
    parts = [of_query + of_key] if own else [of_query, of_key]
    shapes = [(*x.shape[:-1], heads // x.shape[-2], x.shape[-1]) for x in ((query,) if own else (query, key))]
    return [
        factor * part.transpose(1, 2).reshape(shape).sum(-2).norm(dim=-1)
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _errors(case: Case, visible: Tensor) -> tuple[float, float, float]:
    """Errors of dense PyTorch: the largest of a row and of a token's gradient, and the norm of the rows' errors."""
    rows, grads = _dense(case, visible)
    exact_rows, exact_grads = _dense(case.to(torch.float64), visible)
    if not rows.numel():
        return 0.0, 0.0, 0.0
    by_token = [(g - e).norm(dim=-1).max().item() for g, e in zip(grads, exact_grads, strict=True)]
    return (rows - exact_rows).abs().max().item(), max(by_token), (rows - exact_rows).norm().item()


@cache
def dense_errors(distribution: Distribution, length: int) -> tuple[float, float]:
    """The largest errors of rows and tokens in full batches without a mask: of this length, of 23, and short ones."""
    if length == _SHORTEST:  # the other half of the batch has sequences of 5 and 2 tokens, in one call for speed
        sequence = torch.arange(7).repeat_interleave(torch.tensor([5, 5, 5, 2, 2, 2, 2]))
        short = sequence[:, None] == sequence
        visible = torch.stack([torch.ones_like(short)] * 6 + [short] * 6)[:, None]
        row, token, _ = _errors(distribution.draw((12, length), 3, (1, 1), 7), visible)
        return row, token
    row, token, _ = _errors(distribution.draw((6, length), 3, (1, 1), 7), torch.ones(1, 1, 1, 1, dtype=torch.bool))
    short_row, short_token = dense_errors(distribution, _SHORTEST)
    return max(row, short_row), max(token, short_token)


# Takes random numbers, the case, and whether the GPU must be a large one.
Choose = Callable[..., None]


@dataclass(frozen=True)
class Expected:
    """The result of a case in float64, and the errors that are allowed."""

    value: Tensor
    grads: list[Tensor]
    limit: float
    token_limits: Tensor  # (B, S, 1) or (T, 1), before the rounding and the sums over the query heads of a key head
    exponentials: list[Tensor]  # errors of exponentials, (B, S, A) or (T, A) of each gradient


def expect(drawn: Drawn, orders: int = 0) -> Expected:
    """The result of a case. `orders`: also so many random orders of the features give dense PyTorch's errors."""
    value, grads = drawn.case.oracle(drawn.reduction, drawn.upstream)
    token_shape = drawn.case.token_shape()
    longest = max(
        _SHORTEST, token_shape[-1] if not drawn.mask.packed else int(drawn.case.kwargs["cu_seqlens"].diff().max())
    )
    # A few lengths only, so that errors of the dense loss are found in the cache.
    same = (drawn.case, *(_reordered(drawn.case, seed) for seed in range(orders)))
    own_row, own_token, own_norm = map(max, *(_errors(case, drawn.mask.dense()[:, None]) for case in same), (0, 0, 0))
    row, token = dense_errors(drawn.distribution, next(n for n in (_SHORTEST, 64, 150) if n >= longest))
    rounding = torch.finfo(torch.float32).eps * value.norm().item()
    weights = _row_weights(drawn)  # (B, A, S) or (A, T)
    if drawn.reduction == "none":
        limit = 2 * (own_norm + row) + rounding
    else:
        upstream = drawn.upstream.double().abs().clamp(min=1e-300)
        limit = 2 * max(own_row, row) * (weights / upstream).sum().item() + rounding
    token_limits = 2 * (own_token + token) * _largest_weight(drawn, weights)[..., None]
    return Expected(value, grads, limit, token_limits, _errors_of_exponentials(drawn, weights))


def _reordered(case: Case, seed: int) -> Case:
    """The same call with the features of each model in another order."""
    generator = torch.Generator().manual_seed(seed)
    query_t, _, query_s, _ = case.tensors
    orders = [torch.randperm(query.shape[-1], generator=generator) for query in (query_t, query_s)]
    return replace(case, tensors=tuple(x if x is None else x[..., orders[n // 2]] for n, x in enumerate(case.tensors)))


def problem(drawn: Drawn, expected: Expected, backend: str) -> str | None:
    """Runs a case. Returns a description of what is wrong with its result, or None."""
    value, grads = drawn.poisoned.run(drawn.reduction, backend, drawn.upstream)
    error = (value.double() - expected.value).norm().item()
    if not error <= expected.limit:
        norm = expected.value.norm().item()
        return f"value: error {error:.3g}, allowed {expected.limit:.3g}, expected {norm:.6g} (norm)"
    for name, grad, expected_grad, more in zip("qk", grads, expected.grads, expected.exponentials, strict=False):
        group = drawn.case.tensors[2].shape[-2] // grad.shape[-2]  # a key head sums the gradients of its query heads
        errors = (grad.double() - expected_grad).norm(dim=-1)
        unit = torch.finfo(grad.dtype)
        rounding = unit.eps * expected_grad.norm(dim=-1) + unit.smallest_normal * grad.shape[-1]
        most = group * expected.token_limits + more + rounding
        if not (errors <= most).all():
            worst = (errors - most).nan_to_num(nan=math.inf).argmax()
            found, allowed = (x.expand_as(errors).flatten()[worst] for x in (errors, most))
            return f"gradient {name}: error {found:.3g}, allowed {allowed:.3g}"
        if grad.masked_select(~drawn.mask.valid[..., None, None]).any():
            return f"gradient {name} of padding is not 0"
    return None


def _row_weights(drawn: Drawn) -> Tensor:
    """The absolute factor of each row's gradient: its weight in the reduction, times the upstream gradient."""
    shape = drawn.case.row_shape()
    counted = drawn.mask.counted[..., None, :].expand(shape)
    if drawn.reduction == "none":
        return drawn.upstream.double().abs() * counted
    per_sequence = drawn.mask.sequence_weights(drawn.reduction, shape[-2], torch.float64)
    sequences, _ = drawn.mask.sequences_and_positions()
    weights = per_sequence[sequences][..., None, :].expand(shape)
    return weights * counted * drawn.upstream.double().abs()


def _largest_weight(drawn: Drawn, weights: Tensor) -> Tensor:
    """(B, S) or (T,): the largest row weight in the sequence of each token."""
    per_token = weights.amax(-2)
    if not drawn.mask.packed:
        return per_token.amax(-1, keepdim=True).expand_as(per_token)
    bounds = drawn.case.kwargs["cu_seqlens"].tolist()
    parts = [per_token[a:b] for a, b in pairwise(bounds)]
    return torch.cat([part.amax().expand_as(part) if part.numel() else part for part in parts])


@contextmanager
def _served(backend: str, emulated: Mapping[int, Path]) -> Iterator[Choose]:
    """Makes a backend run on this machine. Yields a function that chooses among its machines and kinds of code."""
    if backend == "cuda":
        libraries = [cuda.load(folder, capability=capability) for capability, folder in emulated.items()]
        patched = {"operators": None, "device_type": "cpu", "load_error": None, "device": lambda _device: (0, 0)}

        def choose(draw: random.Random, drawn: Drawn, large: bool = False) -> None:
            library = draw.choice(libraries)
            native.cuda.operators = library.operators
            little = max(drawn.distribution.widths) <= 16 and _least_smem(library, drawn) <= _LITTLE_SMEM[0]
            smem = draw.choice((*_SMEM, _LITTLE_SMEM) if little else _SMEM)
            processors = [draw.choice((1, 4, 132)) for _ in library.emulated_set_props.argtypes[len(smem) :]]
            row_wise = drawn.distribution.cross or drawn.reduction == "none"
            if row_wise and draw.random() < _FEW_WARPS:
                smem = (_least_smem(library, drawn) * draw.choice((1, 1, 1, 2)),) * 2
            # Not every shape has an emulated kernel for sequences beyond shared memory, since compiling it takes long.
            library.emulated_set_props(*(_SMEM[0] if large else smem), *processors)
            library.emulated_set_seed(draw.getrandbits(64))  # the order of the warps

        with mock.patch.multiple(native.cuda, **patched):
            yield choose
        return
    if backend == "triton":
        from tests.interpreter import patch_once

        patch_once()
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns about the poison
    if backend == "cpu":
        assert native.cpu.unavailable_reason() is None
        sets = native.cpu.instruction_sets()
        with mock.patch.dict(os.environ):
            yield lambda draw, *_: os.environ.update({native.INSTRUCTION_SET_VARIABLE: draw.choice(sets)})
        return
    yield lambda *_: None


def _least_smem(library: CDLL, drawn: Drawn) -> int:
    """Bytes of shared memory that a block of a call needs, with the fewest warps and tokens."""
    query_t, key_t, query_s, key_s = drawn.case.tensors
    teacher, student = ([x for x in pair if x is not None] for pair in ((query_t, key_t), (query_s, key_s)))
    library.emulated_set_props(1024, 1024, *(1 for _ in library.emulated_set_props.argtypes[2:]))
    indices = [0, len(teacher) - 1]
    reason = library.operators.unsupported_reason(teacher, student, indices, 0)
    return int(reason.split("need ")[1].split(" bytes")[0])


def check(
    backends: Iterable[str], seeds: range, emulated: Mapping[int, Path] = MappingProxyType({}),
    seconds: float = math.inf, done: Callable[[int, list[str], list[str]], None] = lambda *_: None,
) -> tuple[Counter[str], list[str]]:  # fmt: skip
    """Computes the seeds' cases of some backends.

    Args:
        emulated: folders with the emulated CUDA kernels, by compute capability.
        seconds: no seed begins later.
        done: is called after each seed, with the seed, its backends and the lines of its wrong cases.

    Returns:
        The number of cases of each backend, and a line for each that is wrong.
    """
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    with ExitStack() as stack:
        choose = {backend: stack.enter_context(_served(backend, emulated)) for backend in backends}
        begin = time.monotonic()
        for seed in seeds:
            if time.monotonic() - begin > seconds:
                break
            names = [backend for backend in choose if seed % EVERY[backend] == 0]
            found = _wrong(seed, {name: choose[name] for name in names}) if names else []
            counts.update(names)
            wrong += found
            done(seed, names, found)
    return counts, wrong


def _wrong(seed: int, choose: dict[str, Choose]) -> list[str]:
    drawn = draw(seed)
    expected = expect(drawn)
    lines = []
    for backend in choose:
        try:
            choose[backend](random.Random(seed), drawn)
            try:
                found = problem(drawn, expected, backend)
            except RuntimeError as error:
                if "the emulation has no such kernel" not in str(error):
                    raise
                choose[backend](random.Random(seed), drawn, True)
                found = problem(drawn, expected, backend)
            if found:
                found = problem(drawn, expect(drawn, _ORDERS), backend)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found is not None:
            lines.append(f"WRONG --backends {backend} --seed {seed}: {found}; {drawn.about}")
    return lines


class Journal:
    """A file with a line for each finished seed, its backends, and a line for each wrong case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.lines = text.split("\n")[:-1]  # the rest is unfinished

    @property
    def wrong(self) -> list[str]:
        return [line for line in self.lines if line.startswith("WRONG")]

    @property
    def seeds(self) -> dict[int, list[str]]:
        rows = (line.split() for line in self.lines if line[:1].isdigit())
        return {int(seed): backends for seed, *backends in rows}

    def add(self, seed: int, backends: list[str], wrong: list[str]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in [*wrong, " ".join([str(seed), *backends])]))

    def trim(self) -> None:
        """Removes an unfinished line."""
        self.path.write_text("".join(f"{line}\n" for line in self.lines), encoding="utf-8")


def _sources() -> str:
    """A hash of everything on which the results depend."""
    digest = hashlib.sha256()
    for folder, pattern in (("minilm_kernels", "**/*.py"), ("csrc", "**/*.*"), ("tests/relation", "**/*.*")):
        for path in sorted(ROOT.joinpath(folder).glob(pattern)):
            if path.suffix in (".py", ".h", ".cuh", ".cpp", ".inl"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(options: argparse.Namespace) -> int:
    """Runs all cases in `options.jobs` processes, and shows what is done."""
    seeds = math.ceil(options.cases / sum(1 / EVERY[backend] for backend in options.backends))
    seeds += -seeds % options.jobs
    if options.seed is not None:
        options.first, options.jobs, seeds = options.seed, 1, 1
    name = f"{_sources()}-{options.first}-{seeds}-{options.jobs}-{'-'.join(options.backends)}"
    folder = options.folder / name
    if options.seed is not None:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    emulated = options.folder / f"{_sources()}-emulated"
    for capability in _CAPABILITIES if "cuda" in options.backends else ():
        part = emulated / str(capability)
        if not (part / "emulated.so").exists():
            part.mkdir(parents=True, exist_ok=True)
            cuda.build(part, capability=capability)
    command = [sys.executable, "-m", "tests.relation.random_cases", "--backends", *options.backends]
    command += ["--seconds", str(options.seconds), "--folder", str(emulated), "--stride", str(options.jobs)]
    command += ["--end", str(options.first + seeds), "--first"]
    paths = [folder / f"{number}.txt" for number in range(options.jobs)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if "triton" in options.backends else {})

    def next_seed(number: int) -> int:
        return max(Journal(paths[number]).seeds, default=options.first + number - options.jobs) + options.jobs

    def begin(number: int) -> subprocess.Popen[bytes]:
        Journal(paths[number]).trim()
        arguments = [*command, str(next_seed(number)), "--journal", str(paths[number])]
        return subprocess.Popen(arguments, env=environment, cwd=ROOT)

    before = sum(len(Journal(path).seeds) for path in paths)
    started = time.monotonic()
    jobs = {number: begin(number) for number in range(options.jobs)}
    status = 0
    while jobs:
        time.sleep(_REPORT_SECONDS if all(job.poll() is None for job in jobs.values()) else 0)
        for number, job in list(jobs.items()):
            if job.poll() is None:
                continue
            if job.returncode in _CRASHES:
                line = f"WRONG --seed {next_seed(number)}: the process ended with signal {-job.returncode}"
                Journal(paths[number]).add(next_seed(number), [], [line])
                jobs[number] = begin(number)
                continue
            status |= job.returncode != 0
            del jobs[number]
        _report([Journal(path) for path in paths], seeds, before, time.monotonic() - started)
    journals = [Journal(path) for path in paths]
    print(*(line for journal in journals for line in journal.wrong), sep="\n")
    if not status and sum(len(journal.seeds) for journal in journals) == seeds:
        shutil.rmtree(folder)
    return int(status or any(journal.wrong for journal in journals))


def _report(journals: list[Journal], seeds: int, before: int, seconds: float) -> None:
    counts: Counter[str] = Counter()
    for journal in journals:
        counts.update(backend for backends in journal.seeds.values() for backend in backends)
    finished = sum(len(journal.seeds) for journal in journals)
    left = (seeds - finished) * seconds / max(1, finished - before)
    parts = ", ".join(f"{name} {number}" for name, number in counts.items())
    wrong = sum(len(journal.wrong) for journal in journals)
    print(f"{finished} of {seeds} seeds; cases: {parts}; {wrong} wrong; {left / 60:.0f} minutes left", flush=True)


def main() -> int:
    """Returns 1 if a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backends", nargs="+", choices=list(EVERY), default=list(EVERY))
    add("--cases", type=int, default=100_000, help="number of cases of all backends together")
    add("--first", type=int, default=0, help="the first seed")
    add("--seed", type=int, help="run the cases of this seed alone")
    add("--jobs", type=int, default=os.cpu_count(), help="processes")
    add("--seconds", type=float, default=math.inf, help="no case begins later")
    add("--folder", type=Path, default=ROOT / "build/random", help="keeps the seeds that are done, and the emulation")
    for hidden in ("--stride", "--end"):  # a process of this command: every n-th seed
        add(hidden, type=int, help=argparse.SUPPRESS)
    add("--journal", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.journal is None:
        return _run(options)
    gc.freeze()  # the collector would visit all modules again and again
    parent = os.getppid()

    def done(seed: int, backends: list[str], wrong: list[str]) -> None:
        Journal(options.journal).add(seed, backends, wrong)
        if os.getppid() != parent:  # it was killed; another run may have begun
            raise SystemExit(1)

    seeds = range(options.first, options.end, options.stride)
    emulated = {capability: options.folder / str(capability) for capability in _CAPABILITIES}
    _, wrong = check(options.backends, seeds, emulated, options.seconds, done)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
