"""Suite `accuracy`: errors against dense float64 for every backend, mask and dtype, and for small divergences."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import records
from benchmarks.measure.correctness import TOLERANCE, guarded, loss_and_gradients, relative
from benchmarks.measure.timed_loss import Result, TimedLoss, gradients, leaves
from benchmarks.measure.workload import MASKS, Inputs, Workload, parse_all
from benchmarks.providers import BACKENDS, PROVIDERS
from benchmarks.providers.dense import row_kl
from minilm_kernels.relation import relation_kl_multi

# These lengths reach every path of the kernels (above 64, no multiple of a tile) and allow a dense reference.
SHAPES = {"cpu": ["3x4x150x16x8", "2x2x100x64x32"], "cuda": ["3x4x150x16x8", "3x4x150x16x6", "2x2x600x64x32"]}
DTYPES = ["float32", "float16", "bfloat16"]
RELATIONS = ["qq", "qk"]
# For small divergences, the student is the teacher plus noise; there are 12 288 query rows.
_SMALL = Workload(1, 12, 1024, 16, 16)
_DIVERGENCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    shapes = options.shapes or SHAPES[options.device]
    masks = MASKS if options.masks == ["none"] else options.masks
    dtypes = DTYPES if options.dtypes == ["float32"] else options.dtypes
    relations = RELATIONS if options.relations == [None] else options.relations
    names = []
    trial = Workload(1, 1, 8, 4, 4, device=options.device)
    for name in (name for name in options.providers if name in ("eager", *BACKENDS)):
        record = records.new("accuracy", name, trial, pairs=trial.pairs)
        if guarded(record, partial(_run, trial.inputs(), name)) is None:
            yield record  # one record instead of one for every combination
        else:
            names.append(name)
    for divergence in _DIVERGENCES:
        yield from _small_divergence(divergence, names, options.device)
    for workload in parse_all(shapes, masks, dtypes, relations, options.device):
        yield from _masked(workload, names)


def _masked(workload: Workload, names: list[str]) -> Iterator[records.Record]:
    """The allowed error of a backend: twice that of the dense loss in the same dtype, plus one rounding."""
    inputs = workload.inputs()
    expected = _float64(inputs)
    allowed = _allowed(replace(workload, mask="none", device="cpu"))
    for name in names:
        detail = {"allowed_value": allowed[0], "allowed_grad": allowed[1]}
        record = records.new("accuracy", name, workload, pairs=workload.pairs, detail=detail)
        got = guarded(record, partial(_run, inputs, name))
        if got is not None:
            errors = _errors(got, expected)
            limits = allowed if name in BACKENDS else [TOLERANCE[workload.dtype]] * 2
            right = all(error <= limit for error, limit in zip(errors, limits, strict=True))
            record |= {"error_value": errors[0], "error_grad": errors[1], "status": "ok" if right else "wrong"}
        yield record


@cache
def _allowed(workload: Workload) -> tuple[float, float]:
    """Allowed errors of value and gradient, from two unmasked inputs, because one mean may be right by chance."""
    errors = [
        _errors(_dense_rows(inputs), _dense_rows(inputs.map(Tensor.double)))
        for inputs in map(workload.inputs, (11, 12))
    ]
    value, grad = (2 * max(worst) for worst in zip(*errors, strict=True))
    return value + torch.finfo(torch.float32).eps, grad + torch.finfo(getattr(torch, workload.dtype)).eps


def _dense_rows(inputs: Inputs) -> Result:
    """KL of every query row and the gradient of its sum, by the dense loss in the inputs' own dtype."""
    student = leaves(inputs)
    kl = _row_kl(inputs, student)
    return kl.detach(), gradients(kl.sum(), student)[1]


def _row_kl(inputs: Inputs, student: dict[str, Tensor]) -> Tensor:
    query, key = inputs.relations[0]
    return row_kl(*(x[name].transpose(1, 2) for x in (inputs.teacher, student) for name in (query, key)))


def _small_divergence(divergence: float, names: list[str], device: str) -> Iterator[records.Record]:
    """The loss with its gradient, and single rows (reduction "none"), of models that almost agree, in float32."""
    workload = replace(_SMALL, device=device)
    inputs = _near(workload, (divergence / _unit(device)) ** 0.5)
    expected = _float64(inputs)
    exact = inputs.map(Tensor.double)
    expected_rows = _row_kl(exact, exact.student)
    kl = expected[0].item()
    for name in names:
        record = records.new(
            "accuracy", name, workload, pairs=workload.pairs, detail={"kl": kl, "reduction": "sequence"}
        )
        got = guarded(record, partial(_run, inputs, name))
        if got is not None:
            errors = _errors(got, expected)
            record |= {"error_value": errors[0], "error_grad": errors[1], "status": "ok"}
            record["detail"] |= {"negative": bool((got[0] < 0).item())}
        yield record
        if name not in BACKENDS:
            continue
        detail = {"kl": kl, "reduction": "none"}
        record = records.new("accuracy", name, workload, "forward", pairs=workload.pairs, detail=detail)
        rows = guarded(record, partial(_rows, inputs, name))
        if rows is not None:
            worst = ((rows.double() - expected_rows).abs() / expected_rows).max().item()
            record |= {"error_value": relative(rows, expected_rows), "status": "ok"}
            record["detail"] |= {"worst_row": worst, "negative": bool((rows < 0).any().item())}
        yield record


@cache
def _unit(device: str) -> float:
    """The divergence per squared scale of the noise, measured at scale 0.01."""
    return 1e4 * _float64(_near(replace(_SMALL, S=256, device=device), 1e-2))[0].item()


def _near(workload: Workload, noise: float) -> Inputs:
    inputs, drawn = workload.inputs(), workload.inputs(1).student
    return inputs._replace(student={name: inputs.teacher[name] + noise * x for name, x in drawn.items()})


def _float64(inputs: Inputs) -> Result:
    return loss_and_gradients(inputs, block_scores=2**24)


@torch.no_grad()
def _rows(inputs: Inputs, backend: Any) -> Tensor:
    teacher, student, relations, mask = inputs
    return relation_kl_multi(teacher, student, relations, reduction="none", backend=backend, **mask)[0]


def _run(inputs: Inputs, name: str) -> Result:
    return TimedLoss(PROVIDERS[name].build(inputs), [inputs])()


def _errors(got: Result, expected: Result) -> tuple[float, float]:
    grads = zip(got[1], expected[1], strict=True)
    return relative(got[0], expected[0]), max(relative(g, e) for g, e in grads)
