"""From validated arguments to a backend: the registered operators, autograd around them, and the choice of backend.

Two operators are registered with PyTorch and are opaque to torch.compile: `relation_kl` returns the values and, for a
scalar reduction, the student's gradient with them; `relation_kl_rows_backward` differentiates `reduction="none"`.
To add a backend, write its module (`problem.Backend`), name it in `backends.py` and put it into `_MODULES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilm_kernels.backends import AUTO, BACKENDS

from . import blocked, native_cpu, native_cuda, reference, triton_backend
from .masks import Mask
from .problem import Backend, Problem, Unavailable, gradient_slots, result_dtype

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_MODULES: dict[str, Backend] = dict(
    zip(BACKENDS, (native_cuda, triton_backend, native_cpu, blocked, reference), strict=True)
)


def available_backends() -> dict[str, str | None]:
    """Every backend's name; the value is None where it is usable here, otherwise the reason why not."""
    return {name: module.unavailable() for name, module in _MODULES.items()}


def _serve(name: str, problem: Problem, call: Callable[[Backend], _Result]) -> _Result:
    """`call` of the backend `name`; `auto` goes on to the next one where a backend finds only then that it cannot."""
    if name != "auto":
        reasons = _refusals(name, problem)
        if reasons:
            usable = ", ".join(n for n, reason in available_backends().items() if reason is None)
            raise RuntimeError(f"backend: {name!r} cannot serve this call: {'; '.join(reasons)}. Usable here: {usable}")
        return call(_MODULES[name])
    for candidate in AUTO:
        if not _refusals(candidate, problem):
            try:
                return call(_MODULES[candidate])
            except Unavailable as failure:
                _warn_once(f"another backend than {candidate} serves: {failure}")
    raise RuntimeError("backend: none can serve this call")


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _refusals(name: str, problem: Problem) -> list[str]:
    """Every reason why a backend does not serve; why `auto` passes one over can be read in the log."""
    missing = _MODULES[name].unavailable()
    reasons = [missing] if missing else _MODULES[name].refusals(problem)
    if reasons:
        _log.debug("backend %s does not serve: %s", name, "; ".join(reasons))
    return reasons


class RelationKL(torch.autograd.Function):
    """(R,) or (R, *rows) values of all relations. A scalar's gradient is computed in the forward and scaled here."""

    @staticmethod
    def forward(ctx, pairs, options, attention_mask, cu_seqlens, prefix_lens, *tensors):
        masks = (attention_mask, cu_seqlens, prefix_lens)
        teacher, student = _sides(tensors)
        rows = options[-2] == "none"
        gradient = any(ctx.needs_input_grad) and not rows
        values, grads = torch.ops.minilm_kernels.relation_kl(teacher, student, pairs, *masks, *options, gradient)
        ctx.pairs, ctx.options, ctx.rows = pairs, options, rows
        ctx.dtypes = [x.dtype for x in student]
        ctx.save_for_backward(*((*masks, *tensors) if rows else grads))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.rows:
            masks = ctx.saved_tensors[:3]
            teacher, student = _sides(ctx.saved_tensors[3:])
            *options, _, backend = ctx.options
            slots = torch.ops.minilm_kernels.relation_kl_rows_backward(
                grad, teacher, student, ctx.pairs, *masks, *options, backend
            )
        else:
            slots = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(ctx.dtypes)
        as_they_are = ctx.rows or _is_one(grad)
        for (r, m), slot in zip(gradient_slots(_relations(ctx.pairs)), slots, strict=True):
            part = slot if as_they_are else slot * grad[r]
            so_far = grads[m]
            grads[m] = part if so_far is None else so_far + part
        student_grads = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, None, None, *[None] * len(ctx.dtypes), *student_grads


def _is_one(grad: Tensor) -> bool:
    """Whether scaling may be spared: a pass over all gradients, on the CPU several percent of a loss."""
    if torch.compiler.is_compiling() or type(grad) is not Tensor or grad.device.type != "cpu":
        return False  # not to be read: traced, fake, or on a device that would have to be waited for
    return set(grad.tolist()) == {1.0}


def _sides(tensors) -> tuple[list[Tensor], list[Tensor]]:
    half = len(tensors) // 2
    return list(tensors[:half]), list(tensors[half:])


def _relations(pairs: list[int]) -> list[tuple[int, int]]:
    return list(zip(pairs[::2], pairs[1::2], strict=True))


_INPUTS = (
    "Tensor[] teacher, Tensor[] student, int[] pairs, "
    "Tensor? attention_mask, Tensor? cu_seqlens, Tensor? prefix_lens, "
    "SymInt? max_seqlen, bool causal, float? teacher_scale, float? student_scale"
)
torch.library.define(
    "minilm_kernels::relation_kl",
    f"({_INPUTS}, str reduction, str backend, bool gradient) -> (Tensor, Tensor[])",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "minilm_kernels::relation_kl_rows_backward",
    f"(Tensor row_grads, {_INPUTS}, str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _problem(
    teacher, student, pairs, attention_mask, cu_seqlens, prefix_lens, max_seqlen, causal, teacher_scale, student_scale
) -> Problem:
    leading = tuple(student[0].shape[:-2])
    mask = Mask(leading, student[0].device, attention_mask, cu_seqlens, max_seqlen, causal, prefix_lens)
    mask.check_packing()
    return Problem(teacher, student, _relations(pairs), mask, teacher_scale, student_scale)


@torch.library.impl("minilm_kernels::relation_kl", "default")
def _relation_kl(teacher, student, *arguments):
    *inputs, reduction, backend, gradient = arguments
    # Under autocast the products inside a backend would be rounded to half precision.
    with torch.autocast(student[0].device.type, enabled=False):
        problem = _problem(teacher, student, *inputs)
        if reduction == "none":
            return _serve(backend, problem, lambda module: module.rows(problem)), []
        weights = problem.mask.weights(reduction, problem.heads, problem.dtype)
        return _serve(backend, problem, lambda module: module.scalar(problem, weights, gradient))


@torch.library.register_fake("minilm_kernels::relation_kl")
def _relation_kl_fake(teacher, student, pairs, *inputs):
    *_, reduction, _, gradient = inputs
    relations = _relations(pairs)
    *batch, positions, heads, _ = student[0].shape
    shape = (len(relations), *batch, heads, positions) if reduction == "none" else (len(relations),)
    values = student[0].new_empty(shape, dtype=result_dtype(teacher, student))
    return values, _empty_slots(teacher, student, relations) if gradient and reduction != "none" else []


@torch.library.impl("minilm_kernels::relation_kl_rows_backward", "default")
def _relation_kl_rows_backward(row_grads, teacher, student, *arguments):
    *inputs, backend = arguments
    with torch.autocast(student[0].device.type, enabled=False):
        problem = _problem(teacher, student, *inputs)
        return _serve(backend, problem, lambda module: module.rows_gradient(problem, row_grads))


@torch.library.register_fake("minilm_kernels::relation_kl_rows_backward")
def _relation_kl_rows_backward_fake(row_grads, teacher, student, pairs, *inputs):
    return _empty_slots(teacher, student, _relations(pairs))


def _empty_slots(teacher, student, relations) -> list[Tensor]:
    dtype = result_dtype(teacher, student)
    return [student[m].new_empty(student[m].shape, dtype=dtype) for _, m in gradient_slots(relations)]
