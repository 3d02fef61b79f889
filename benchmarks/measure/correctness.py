"""Correctness: a provider is timed only after its loss and gradient agree with a dense float64 computation.

The float64 loss shares no code with the package, so that a mistake of the package cannot hide here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.providers import PROVIDERS, Unsupported
from benchmarks.providers.dense import row_kl
from benchmarks.providers.provider import DenseMask

from . import records
from .memory import OutOfMemory, isolated, memory_limit
from .timed_loss import Result, TimedLoss
from .timing import first_run
from .workload import Inputs, Workload

# A larger relative error means another loss, not rounding.
TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
# With more pairs than this (an estimated few seconds), only the first sequences are checked.
_MAX_PAIRS = {"cpu": 10**8, "cuda": 2 * 10**10}
# Number of float64 scores in memory at once, of one relation matrix: 32 and 512 MiB.
_BLOCK_SCORES = {"cpu": 2**22, "cuda": 2**26}
# Peak memory of a dense loss as a number of score matrices of one relation: scores, log-probabilities and gradients of
# both models.
_DENSE_MATRICES = 10


class Limits(NamedTuple):
    """Limits of one run: bytes beyond the inputs (None: no limit), and seconds."""

    bytes: int | None
    seconds: float


class Oracle:
    """The float64 loss and gradients of the first sequences, up to `most` pairs (default: `_MAX_PAIRS`)."""

    def __init__(self, inputs: Inputs, pairs: int, device: str, most: int | None = None) -> None:
        share = min(1.0, (most or _MAX_PAIRS[device]) / max(1, pairs))
        self.sequences = max(1, int(inputs.sequences * share))
        self.part = inputs if self.sequences == inputs.sequences else inputs.first(self.sequences)
        # The loss averages over sequences, so a sequence has less weight in the gradient of all than in the part's.
        self._share = self.sequences / inputs.sequences
        self.value, self.grads = loss_and_gradients(self.part, _BLOCK_SCORES[device])

    def errors(self, value: Tensor, grads: Sequence[Tensor]) -> tuple[float, float | None]:
        """Relative errors of the part's loss, and of gradients (if any) of the part or of all sequences."""
        share = 1.0 if len(grads) and grads[0].shape == self.grads[0].shape else self._share
        worst = [relative(g[: len(e)], e * share) for g, e in zip(grads, self.grads, strict=bool(len(grads)))]
        return relative(value, self.value), max(worst) if worst else None

    def check(self, record: records.Record, value: Tensor, grads: Sequence[Tensor]) -> bool:
        """Write the errors into a record. If they are too large, set the status "wrong" and return False."""
        error_value, error_grad = self.errors(value, grads)
        record |= {"error_value": error_value, "error_grad": error_grad}
        worst, allowed = max(error_value, error_grad or 0.0), TOLERANCE[record["dtype"]]
        if worst < allowed:
            return True
        record |= {"status": "wrong", "reason": f"relative error {worst:.1e}, allowed {allowed:.0e}"}  # NaN as well
        return False


def loss_and_gradients(inputs: Inputs, block_scores: int) -> Result:
    """The loss by its definition in float64, a block of query rows at a time, and its gradients."""
    mask = DenseMask.of(inputs, torch.float64)
    sequences, _, length = mask.weights.shape
    exact = inputs.map(lambda x: mask.padded(x).detach().double())  # (B, A, S, D)
    masked = None if mask.masked is None else mask.masked.expand(sequences, 1, length, length)
    grads = {name: torch.zeros_like(x) for name, x in exact.student.items()}
    total = mask.weights.new_zeros(())
    block = max(1, block_scores // (inputs.heads * length))
    for b in range(sequences):
        student = {name: x[b].requires_grad_() for name, x in exact.student.items()}
        for query, key in inputs.relations:
            for start in range(0, length, block):
                rows = slice(start, start + block)
                heads = (exact.teacher[query][b, :, rows], exact.teacher[key][b], student[query][:, rows], student[key])
                kl = row_kl(*heads, masked=None if masked is None else masked[b, :, rows])
                value = (kl * mask.weights[b, :, rows]).sum()
                value.backward()
                total += value.detach()
        for name, x in student.items():
            grads[name][b] = 0.0 if x.grad is None else x.grad
    valid = mask.weights[:, 0] > 0
    by_token = (x.transpose(1, 2) for x in grads.values())  # (B, S, A, D)
    return total, [x if mask.tokens is None else x[valid] for x in by_token]


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm; the absolute error where the expected value is 0."""
    difference, norm = (got.double() - expected).norm().item(), expected.norm().item()
    return difference / norm if norm else difference


def guarded(record: records.Record, work: Callable[[], Any]) -> Any:
    """Return `work()`. If it raises, write the status and the reason into the record and return None."""
    try:
        return work()
    except Exception as error:
        status = _status(error)
        lines = str(error).strip().splitlines() or [""]
        prefix = f"{type(error).__name__}: " if status == "failed" else ""
        record |= {"status": status, "reason": prefix + lines[0][:300]}
    gc.collect()  # tensors that the traceback held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _status(error: Exception) -> str:
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError):
        return "oom"
    if isinstance(error, TimeoutError):
        return "slow"
    refused = str(error).startswith("backend: ")  # the operator's own refusal, with every reason
    return "unsupported" if refused or isinstance(error, Unsupported | NotImplementedError) else "failed"


def admit(
    record: records.Record, workload: Workload, copies: list[Inputs], oracle: Oracle, limits: Limits
) -> TimedLoss | None:
    """The provider's loss on `copies` if it is correct and within the limits, otherwise None (see the record)."""
    return guarded(record, lambda: _admit(record, workload, copies, oracle, limits))


def _admit(
    record: records.Record, workload: Workload, copies: list[Inputs], oracle: Oracle, limits: Limits
) -> TimedLoss | None:
    name, mode, device = record["provider"], record["mode"], workload.device
    build = PROVIDERS[name].build
    risky = _is_risky(name, workload, limits)
    if risky:
        isolated(_try, name, workload.with_batch(oracle.sequences), mode, limits)
    with memory_limit(limits.bytes, device):
        timed = TimedLoss(build(oracle.part), [oracle.part], mode)
        (value, grads), seconds = first_run(timed, device)
        parts = workload.B / oracle.sequences
        if parts * seconds > limits.seconds:  # the first run may have compiled
            _, seconds = first_run(timed, device)
        if parts * seconds > limits.seconds:
            raise TimeoutError(f"{parts * seconds:.0f} s per run, by {oracle.sequences} of {workload.B} sequences")
        if parts > 1:
            if risky:
                isolated(_try, name, workload, mode, limits)
            timed = TimedLoss(build(copies[0]), copies, mode)
            _, grads = timed()
            record["detail"]["checked_sequences"] = oracle.sequences
        elif len(copies) > 1:
            timed = TimedLoss(timed.loss, copies, mode)
    # The value that a backward returns was computed by the forward, which is checked in its own mode.
    return timed if oracle.check(record, oracle.value if mode == "backward" else value, grads) else None


def _is_risky(name: str, workload: Workload, limits: Limits) -> bool:
    """True if a run might not fit the CPU's memory, so that another process must try it first."""
    if workload.device != "cpu" or limits.bytes is None or not PROVIDERS[name].dense:
        return False
    return _DENSE_MATRICES * getattr(torch, workload.dtype).itemsize * workload.pairs > limits.bytes / 2


def _try(name: str, workload: Workload, mode: str, limits: Limits) -> None:
    inputs = workload.inputs()
    with memory_limit(limits.bytes, workload.device):
        TimedLoss(PROVIDERS[name].build(inputs), [inputs], mode)()
