"""Random calls of every backend, compared with the float64 reference: `make random`.

    python -m tests.relation.random_cases --cases 100000 --backends cuda triton cpu torch
    python -m tests.relation.random_cases --backends cuda --seed 12345     # a single case again

A case is a function of its seed. `cuda` runs in the emulated thread block and `triton` in Triton's interpreter, so that
no GPU is needed.

The contract allows twice the error of dense PyTorch in the same dtypes, plus one rounding of the result. Dense PyTorch
is run on the inputs of the case, and on full batches with its widths, scales, dtypes and distribution: the error on few
rows may be small by chance. The batches have its length and short ones, since rows with few visible keys exist under
every mask. The errors of single rows, in the Euclidean norm as in the contract, may be twice the sum of the norm of the
dense errors on the inputs and the largest error of a row in the batches. The error of a reduced loss may be twice the
largest error of a dense row times the sum of the rows' weights; that of a token's gradient twice the largest error of a
dense token times the largest weight in its sequence. To this, one rounding is added.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation.backends import native
from minilm_kernels.relation.masks import Mask
from tests.relation.backends import cuda
from tests.relation.cases import Case

BACKENDS = ("cuda", "triton", "cpu", "torch")
SHARES = (0.7, 0.02, 0.18, 0.1)  # the number of cases of each backend; a case of the interpreter takes half a second
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMMON = ((16, 8), (16, 6), (16, 12), (64, 32))
_WIDTHS = (*_COMMON, *_COMMON, (12, 6), (32, 16), (1, 1), (7, 17), (24, 40), (3, 64))
_LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 97, 127, 128, 129)
_SMEM = ((232448, 233472), (232448, 30000))  # bytes of shared memory of a block and of an SM
_LITTLE_SMEM = (16384, 16384)  # for long sequences of narrow heads, which then do not fit
_POISON = (math.nan, math.inf, -math.inf, 3e38)


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


def draw(seed: int, half: bool = True, length: int | None = None) -> Drawn:
    """The case of a seed. Without `half`, bfloat16 becomes float16, for Triton's interpreter; `length` is a limit."""
    choose = random.Random(seed)
    dtypes = tuple(choose.choice(_DTYPES) for _ in range(2)) if choose.random() < 0.2 else (choose.choice(_DTYPES),) * 2
    if not half:
        dtypes = tuple(torch.float16 if dtype == torch.bfloat16 else dtype for dtype in dtypes)
    cross = choose.random() < 0.4
    widths = choose.choice(_WIDTHS)
    scales = tuple(choose.choice((None, None, None, 0.2, -0.3)) for _ in range(2))
    distribution = Distribution(dtypes, widths, choose.choice((0.1, 1.0, 1.0, 3.0)), scales, cross)
    heads = choose.choice((1, 1, 2, 3, 4))
    groups = tuple(choose.choice([g for g in (1, 2, 3, 4) if heads % g == 0]) for _ in range(2)) if cross else (1, 1)
    longest = choose.choice(_LENGTHS) if choose.random() < 0.6 else choose.randint(1, 150)
    longest = min(longest, length or longest)
    sequences = choose.randint(1, 3)
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
    has_keys = visible.any(-1, keepdim=True)

    def log_relation(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        key = key.repeat_interleave(query.shape[-2] // key.shape[-2], dim=-2)
        if query.dim() == 3:  # packed tokens are a batch of one sequence
            query, key = query[None], key[None]
        scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * scale
        return scores.masked_fill(~visible & has_keys, -math.inf).masked_fill(~has_keys, 0.0).log_softmax(-1)

    log_t = log_relation(query_t, query_t if key_t is None else key_t, case.kwargs.get("teacher_scale"))
    log_s = log_relation(leaves[0], leaves[-1], case.kwargs.get("student_scale"))
    rows = (log_t.exp() * (log_t - log_s).masked_fill(~visible, 0.0)).sum(-1)
    rows.sum().backward()
    return rows.detach().double(), [x.grad.double() for x in leaves]


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
    """The largest errors in full batches without a mask."""
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    sizes = ((6, length), (30, 5), (60, 2))
    errors = [_errors(distribution.draw(size, 3, (1, 1), 7), everything) for size in sizes]
    return max(row for row, _, _ in errors), max(token for _, token, _ in errors)


def problem(drawn: Drawn, backend: str) -> str | None:
    """Runs a case. Returns a description of what is wrong with its result, or None."""
    value, grads = drawn.poisoned.run(drawn.reduction, backend, drawn.upstream)
    expected, expected_grads = drawn.case.oracle(drawn.reduction, drawn.upstream)
    token_shape = drawn.case.token_shape()
    longest = max(23, token_shape[-1] if not drawn.mask.packed else int(drawn.case.kwargs["cu_seqlens"].diff().max()))
    # A few lengths only, so that errors of the dense loss are found in the cache.
    own_row, own_token, own_norm = _errors(drawn.case, drawn.mask.dense()[:, None])
    row, token = dense_errors(drawn.distribution, next(n for n in (23, 64, 150) if n >= longest))
    token_error = max(own_token, token)
    rounding = torch.finfo(torch.float32).eps * expected.norm().item()
    weights = _row_weights(drawn)  # (B, A, S) or (A, T)
    if drawn.reduction == "none":
        limit = 2 * (own_norm + row) + rounding
    else:
        upstream = drawn.upstream.double().abs().clamp(min=1e-300)
        limit = 2 * max(own_row, row) * (weights / upstream).sum().item() + rounding
    error = (value.double() - expected).norm().item()
    if not error <= limit:
        return f"value: error {error:.3g}, allowed {limit:.3g}, expected {expected.norm().item():.6g} (norm)"
    allowed = 2 * token_error * _largest_weight(drawn, weights)[..., None]  # (B, S, 1) or (T, 1)
    for name, grad, expected_grad in zip("qk", grads, expected_grads, strict=False):
        group = weights.shape[-2] // grad.shape[-2]  # a key head sums the gradients of its query heads
        errors = (grad.double() - expected_grad).norm(dim=-1)
        unit = torch.finfo(grad.dtype)
        most = group * allowed + unit.eps * expected_grad.norm(dim=-1) + unit.smallest_normal * grad.shape[-1]
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
def _emulation(folder: Path | None) -> Iterator[Path]:
    """A folder with the emulated CUDA kernels: the given one, or a new one."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as new:
        cuda.build(Path(new))
        yield Path(new)


@contextmanager
def _served(backend: str, folder: Path | None) -> Iterator[Callable[[random.Random, Drawn], None]]:
    """Makes a backend run on this machine. Yields a function that chooses among its machines and kinds of code."""
    if backend == "cuda":
        with _emulation(folder) as built:
            library = cuda.load(built)
        operators = torch.ops.minilm_kernels_cuda_emulated
        emulated = {"operators": operators, "device_type": "cpu", "load_error": None, "device": lambda _device: (0, 0)}

        def choose(draw: random.Random, drawn: Drawn) -> None:
            narrow = max(drawn.distribution.widths) <= 16
            smem = draw.choice((*_SMEM, _LITTLE_SMEM) if narrow else _SMEM)
            processors = [draw.choice((1, 4, 132)) for _ in library.emulated_set_props.argtypes[len(smem) :]]
            library.emulated_set_props(*smem, *processors)
            library.emulated_set_seed(draw.getrandbits(64))  # the order of the warps

        with mock.patch.multiple(native.cuda, **emulated):
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
            yield lambda draw, _: os.environ.update({native.INSTRUCTION_SET_VARIABLE: draw.choice(sets)})
        return
    yield lambda draw, _: None


def check(backend: str, seeds: range, seconds: float = math.inf, folder: Path | None = None) -> tuple[int, list[str]]:
    """The number of cases, and a line for each that is wrong. `folder` has the emulated CUDA kernels."""
    torch.set_num_threads(1)
    count = 0
    wrong: list[str] = []
    interpreted = backend == "triton"
    with _served(backend, folder) as choose:
        begin = time.monotonic()
        for seed in seeds:
            if time.monotonic() - begin > seconds:
                break
            drawn = draw(seed, half=not interpreted, length=40 if interpreted else None)
            choose(random.Random(seed), drawn)
            try:
                found = problem(drawn, backend)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            count += 1
            if found is not None:
                wrong.append(f"WRONG --backends {backend} --seed {seed}: {found}; {drawn.about}")
                print(wrong[-1], flush=True)
    return count, wrong


def main() -> int:
    """Returns 1 if a case is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    add("--cases", type=int, default=100_000, help="number of cases of all backends together")
    add("--first", type=int, default=0, help="the first seed")
    add("--seed", type=int, help="run this case alone")
    add("--jobs", type=int, default=os.cpu_count(), help="processes")
    add("--seconds", type=float, default=math.inf, help="no case begins later")
    add("--stride", type=int, help=argparse.SUPPRESS)  # a process of this command: every n-th case of one backend
    add("--folder", type=Path, help="folder with the emulated CUDA kernels; default: build them")
    options = parser.parse_args()
    if options.seed is not None or options.stride is not None:
        first, step, cases = options.seed, 1, 1
        if options.stride is not None:
            first, step, cases = options.first, options.stride, options.cases
        seeds = range(first, first + step * cases, step)
        count, wrong = check(options.backends[0], seeds, options.seconds, options.folder)
        print(f"{options.backends[0]}: {count} cases, {len(wrong)} wrong", flush=True)
        return int(bool(wrong))
    chosen = {name: share for name, share in zip(BACKENDS, SHARES, strict=True) if name in options.backends}
    failed = False
    with _emulation(options.folder) if "cuda" in chosen else nullcontext("") as folder:
        for backend, share in chosen.items():
            cases = math.ceil(options.cases * share / sum(chosen.values()) / options.jobs)
            environment = os.environ | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})
            command = [sys.executable, "-m", "tests.relation.random_cases", "--backends", backend]
            command += ["--cases", str(cases), "--stride", str(options.jobs), "--seconds", str(options.seconds)]
            command += ["--folder", str(folder), "--first"]
            jobs = [subprocess.Popen([*command, str(options.first + n)], env=environment) for n in range(options.jobs)]
            failed |= max(job.wait(timeout=24 * 3600) for job in jobs) != 0  # waits for all
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
