"""Who may be measured at a workload: a provider is admitted after it computed the right loss within the limits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import rows
from .allocation import OutOfMemory, at_most, isolated
from .oracle import Oracle
from .providers import PROVIDERS, Provider, Unsupported
from .steps import Step
from .timing import first_run
from .workloads import Inputs, Workload

# What a dense loss needs at its peak, in score matrices of one relation (scores, their logarithms and gradients of both
# sides): enough to tell harmless from risky.
_DENSE_MATRICES = 10


class Limits(NamedTuple):
    """What one step may take."""

    bytes: int | None  # of memory, beyond the inputs
    seconds: float


def guarded(row: rows.Row, work: Callable[[], Any]) -> Any:
    """`work()`; what goes wrong becomes the status and the reason of the row, and None is returned."""
    try:
        return work()
    except Exception as error:
        status = _status(error)
        lines = str(error).strip().splitlines() or [""]
        prefix = f"{type(error).__name__}: " if status == "failed" else ""
        row |= {"status": status, "reason": prefix + lines[0][:300]}
    gc.collect()  # what the traceback held
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _status(error: Exception) -> str:
    if isinstance(error, OutOfMemory | torch.OutOfMemoryError):
        return "oom"
    if isinstance(error, TimeoutError):
        return "slow"
    refused = str(error).startswith("backend: ")  # by the operator, with every reason
    return "unsupported" if refused or isinstance(error, Unsupported | NotImplementedError) else "failed"


def admit(row: rows.Row, workload: Workload, copies: list[Inputs], oracle: Oracle, mode: str, limits: Limits) -> Any:
    """The provider's step over `copies`, or None; errors, status and reason go into `row`."""
    return guarded(row, lambda: _admit(row, PROVIDERS[row["provider"]], workload, copies, oracle, mode, limits))


def _admit(
    row: rows.Row,
    provider: Provider,
    workload: Workload,
    copies: list[Inputs],
    oracle: Oracle,
    mode: str,
    limits: Limits,
) -> Step | None:
    if _risky(provider, workload, limits):
        isolated(_try, row["provider"], workload.with_batch(oracle.sequences), mode, limits)
    with at_most(limits.bytes, workload.device):
        step = Step(provider.build(oracle.part), [oracle.part], mode)
        (value, grads), seconds = first_run(step, workload.device)
        parts = workload.B / oracle.sequences
        if parts * seconds > limits.seconds:  # it may have been compiled on the way
            _, seconds = first_run(step, workload.device)
        if parts * seconds > limits.seconds:
            raise TimeoutError(f"{parts * seconds:.0f} s a step, by {oracle.sequences} of {workload.B} sequences")
        if parts > 1:
            if _risky(provider, workload, limits):
                isolated(_try, row["provider"], workload, mode, limits)
            step = Step(provider.build(copies[0]), copies, mode)
            _, grads = step()
        elif len(copies) > 1:
            step = Step(step.loss, copies, mode)
    if mode == "backward":  # its value is the forward's
        value = oracle.value
    errors, fault = oracle.fault(workload.dtype, value, grads)
    row |= errors
    if parts > 1:
        row["detail"]["checked_sequences"] = oracle.sequences
    if fault is not None:
        row |= {"status": "wrong", "reason": fault}
        return None
    return step


def _risky(provider: Provider, workload: Workload, limits: Limits) -> bool:
    """A step that may not fit on a CPU is tried in another process first: there it cannot do harm."""
    if workload.device != "cpu" or limits.bytes is None or not provider.dense:
        return False
    itemsize = getattr(torch, workload.dtype).itemsize
    return _DENSE_MATRICES * itemsize * workload.pairs > limits.bytes / 2


def _try(name: str, workload: Workload, mode: str, limits: Limits) -> None:
    inputs = workload.inputs()
    with at_most(limits.bytes, workload.device):
        Step(PROVIDERS[name].build(inputs), [inputs], mode)()
