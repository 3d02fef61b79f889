"""Backend `cpu`: the C++ kernels of csrc/cpu, AVX-512, AVX2 or portable, chosen for the processor that runs.

The library is built with the package where a compiler is found (setup.py). It registers one private operator through
PyTorch's stable ABI; here a problem becomes its arguments. See docs/cpu.md.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import RelationInputs, grad_buffers

_LIBRARY = Path(__file__).parents[2] / "_cpu.abi3.so"
_MISSING = _LIBRARY.with_name("_cpu.missing")  # left by setup.py: why it could not build the library
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Overrides the choice of instruction set; one of `instruction_sets()`.
_VARIABLE = "MINILM_KERNELS_CPU"


@cache
def unavailable_reason() -> str | None:
    if not _LIBRARY.exists():
        reason = _why_missing()
        if reason is None:  # pure Python on purpose
            return "the package was installed without its CPU library"
    else:
        try:
            torch.ops.load_library(_LIBRARY)
            return None
        except OSError as error:
            reason = f"its library does not load: {error}"
    warnings.warn(f"minilm_kernels: on the CPU the slower backend `torch` serves; {reason}", stacklevel=2)
    return reason


def _why_missing() -> str | None:
    """Why nobody meant the library to be missing; None for an installation that was asked to leave it out."""
    if _MISSING.exists():
        return f"the package was installed without its CPU library: {_MISSING.read_text(encoding='utf-8')}"
    source = _LIBRARY.parents[1]
    if not (source / "csrc" / "cpu").is_dir():
        return None
    return (
        f"this is the source tree {source}, in which the CPU library is not built; build it there with "
        "`pip install -e .`, or, if the package is installed elsewhere, start Python in another folder"
    )


@cache
def instruction_sets() -> list[str]:
    """What this processor can run, best first."""
    return torch.ops.minilm_kernels_cpu.instruction_sets().split(",")


def instruction_set() -> str:
    """The one that runs."""
    return os.environ.get(_VARIABLE) or instruction_sets()[0]


def unsupported_reasons(problem: RelationInputs) -> list[str]:
    reasons = []
    if problem.mask.device.type != "cpu":
        reasons.append(f"it computes on the CPU, the tensors are on {problem.mask.device}")
    others = {x.dtype for x in (*problem.teacher, *problem.student)} - set(_DTYPES)
    if others:
        reasons.append(
            f"it computes in float32 for float32, float16 and bfloat16, not for {', '.join(map(str, others))}"
        )
    chosen = os.environ.get(_VARIABLE)
    if chosen and chosen not in instruction_sets():
        reasons.append(f"{_VARIABLE} is {chosen!r}, but this processor runs {', '.join(instruction_sets())}")
    return reasons


def forward_reduced(problem: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    values = weights.new_empty(len(problem.relations))
    grads = _new_gradients(problem) if gradient else []
    _run(problem, weights=weights.contiguous(), values=values, grads=grads)
    return values, grads


def forward_none(problem: RelationInputs) -> Tensor:
    *batch, positions = problem.mask.token_shape
    shape = (len(problem.relations), *batch, problem.heads, positions)
    out = torch.zeros(shape, dtype=torch.float32, device=problem.mask.device)
    _run(problem, rows=out)
    return out


def backward_none(problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    grads = _new_gradients(problem)
    _run(problem, row_grads=row_grads.float().contiguous(), grads=grads)
    return grads


def _new_gradients(problem: RelationInputs) -> list[Tensor]:
    """One of every slot, all of it to be written."""
    return [
        torch.empty(problem.student[m].shape, dtype=torch.float32, device=problem.mask.device)
        for _, m in grad_buffers(problem.relations)
    ]


def _run(
    problem: RelationInputs,
    weights: Tensor | None = None,
    row_grads: Tensor | None = None,
    values: Tensor | None = None,
    rows: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> None:
    tokens, starts, prefixes = problem.mask.unpad()
    torch.ops.minilm_kernels_cpu.relation_kl(
        problem.teacher,
        problem.student,
        [m for relation in problem.relations for m in relation],
        [scale for relation in problem.relations for scale in problem.scales(relation)],
        tokens,
        starts,
        prefixes,
        not problem.mask.bidirectional,
        weights,
        row_grads,
        values,
        rows,
        grads or [],
        instruction_set(),
    )
