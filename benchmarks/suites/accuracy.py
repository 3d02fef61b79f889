"""Suite `accuracy`: errors against the dense float64 reference, every backend × mask × dtype, and small divergences."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.candidates import guarded
from benchmarks.oracle import WRONG, relative
from benchmarks.providers import PROVIDERS, backends
from benchmarks.steps import Step
from benchmarks.workloads import MASKS, Inputs, Workload, parse_all
from minilm_kernels.relation import relation_kl_multi

# Long enough for all paths of the kernels (beyond 64 tokens, no multiple of a tile), short for a dense reference.
SHAPES = {"cpu": ["3x4x150x16x8", "2x2x100x64x32"], "cuda": ["3x4x150x16x8", "3x4x150x16x6", "2x2x600x64x32"]}
DTYPES = ["float32", "float16", "bfloat16"]
RELATIONS = ["qq", "qk"]
# Small divergences: the student is the teacher plus noise, 12 288 rows.
_SMALL = Workload(1, 12, 1024, 16, 16)
_DIVERGENCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    shapes = options.shapes or SHAPES[options.device]
    masks = MASKS if options.masks == ["none"] else options.masks
    dtypes = DTYPES if options.dtypes == ["float32"] else options.dtypes
    relations = RELATIONS if options.relations == [None] else options.relations
    names = []
    trial = Workload(1, 1, 8, 4, 4, device=options.device)
    for name in options.providers:
        if name not in ("eager", *backends()):
            continue
        row = _row(trial, name, "full")
        if guarded(row, partial(_full, trial.inputs(), name)) is None:
            yield row  # said once, not for every combination
        else:
            names.append(name)
    for divergence in _DIVERGENCES:
        yield from _small_rows(divergence, names, options.device)
    for workload in parse_all(shapes, masks, dtypes, relations, options.device):
        yield from _mask_rows(workload, names)


def _mask_rows(workload: Workload, names: list[str]) -> Iterator[rows.Row]:
    """Backends are held to twice the error of the dense loss in the same dtype, plus one rounding of the result."""
    inputs = workload.inputs()
    expected = _reference(inputs)
    allowed = _allowed(replace(workload, mask="none", device="cpu"))
    for name in names:
        row = _row(workload, name, "full")
        row["detail"] = dict(zip(("allowed_value", "allowed_grad"), allowed, strict=True))
        got = guarded(row, partial(_full, inputs, name))
        if got is not None:
            errors = _errors(got, expected)
            limits = allowed if name in backends() else [WRONG[workload.dtype]] * 2
            right = all(error <= limit for error, limit in zip(errors, limits, strict=True))
            row |= {"error_value": errors[0], "error_grad": errors[1], "status": "ok" if right else "wrong"}
        yield row


@cache
def _allowed(workload: Workload) -> tuple[float, float]:
    """The yardstick: full sequences of the same distribution; the larger of two draws, since a mean may err by luck."""
    worst = [0.0, 0.0]
    for seed in (11, 12):
        rows_error, grad_error = _dense_errors(workload.inputs(seed))
        worst = [max(worst[0], rows_error), max(worst[1], grad_error)]
    eps = torch.finfo(getattr(torch, workload.dtype)).eps
    return 2 * worst[0] + torch.finfo(torch.float32).eps, 2 * worst[1] + eps


def _dense_errors(inputs: Inputs) -> tuple[float, float]:
    """Of rows and gradients, by the dense loss in the inputs' own dtype."""
    exact = inputs.double()
    results = []
    for side in (inputs, exact):
        leaves = {name: x.detach().requires_grad_() for name, x in side.student.items()}
        (query, key) = side.relations[0]
        logs = [
            (s[query].transpose(1, 2) @ s[key].permute(0, 2, 3, 1) * s[query].shape[-1] ** -0.5).log_softmax(-1)
            for s in (side.teacher, leaves)
        ]
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        results.append((kl.detach(), list(torch.autograd.grad(kl.sum(), list(leaves.values())))))
    (got, grads), (expected, exact_grads) = results
    return relative(got, expected), max(relative(g, e) for g, e in zip(grads, exact_grads, strict=True))


def _small_rows(divergence: float, names: list[str], device: str) -> Iterator[rows.Row]:
    """The scalar with its gradient, and single rows ("none"), where teacher and student almost agree, in float32."""
    workload = replace(_SMALL, device=device)
    inputs = _near(workload, (divergence / _unit(device)) ** 0.5)
    expected, expected_rows = _reference(inputs), _reference_rows(inputs)
    kl = expected[0].item()
    for name in names:
        row = _row(workload, name, "full")
        row["detail"] = {"kl": kl, "reduction": "sequence"}
        got = guarded(row, partial(_full, inputs, name))
        if got is not None:
            errors = _errors(got, expected)
            row |= {"error_value": errors[0], "error_grad": errors[1], "status": "ok"}
            row["detail"] |= {"negative": bool((got[0] < 0).item())}
        yield row
        if name not in backends():
            continue
        row = _row(workload, name, "forward")
        row["detail"] = {"kl": kl, "reduction": "none"}
        found = guarded(row, partial(_rows, inputs, name))
        if found is not None:
            worst = ((found.double() - expected_rows).abs() / expected_rows).max().item()
            row |= {"error_value": relative(found, expected_rows), "status": "ok"}
            row["detail"] |= {"worst_row": worst, "negative": bool((found < 0).any().item())}
        yield row


@cache
def _unit(device: str) -> float:
    """The divergence at noise of a hundredth, times ten thousand: it grows with the square of the noise."""
    return 1e4 * _reference(_near(replace(_SMALL, S=256, device=device), 1e-2))[0].item()


def _near(workload: Workload, noise: float) -> Inputs:
    inputs = workload.inputs()
    drawn = workload.inputs(1).student
    return inputs._replace(student={name: inputs.teacher[name] + noise * x for name, x in drawn.items()})


def _reference(inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    exact = inputs.double()
    leaves = {name: x.requires_grad_() for name, x in exact.student.items()}
    value = relation_kl_multi(exact.teacher, leaves, exact.relations, backend="reference", **exact.mask).sum()
    return value.detach(), list(torch.autograd.grad(value, list(leaves.values())))


def _reference_rows(inputs: Inputs) -> Tensor:
    return _rows(inputs.double(), "reference")


def _rows(inputs: Inputs, backend: str) -> Tensor:
    with torch.no_grad():
        return relation_kl_multi(
            inputs.teacher, inputs.student, inputs.relations, reduction="none", backend=backend, **inputs.mask
        )


def _full(inputs: Inputs, name: str) -> tuple[Tensor, list[Tensor]]:
    return Step(PROVIDERS[name].build(inputs), [inputs], "full")()


def _errors(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    grads = zip(got[1], expected[1], strict=True)
    return relative(got[0], expected[0]), max(relative(g, e) for g, e in grads)


def _row(workload: Workload, name: str, mode: str) -> rows.Row:
    row = rows.new("accuracy", name, workload.device, workload.dtype, mode, workload.shape())
    return row | {"pairs": workload.pairs}
