"""From validated arguments to a backend: the registered operators, autograd around them, and the choice of backend.

Two operators are registered with PyTorch and are opaque to torch.compile: `relation_kl` returns the values and, for a
scalar reduction, the student's gradient with them; `relation_kl_rows_backward` differentiates `reduction="none"`.
To add a backend, write its module (`problem.Backend`), name it in `backends.py` and put it into `_MODULES`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minilm_kernels.backends import AUTO, BACKENDS

from .backends import blocked, native, reference
from .backends.triton import launch as triton_backend
from .inputs import Backend, BackendUnavailable, RelationInputs, grad_buffers, result_dtype
from .masks import Mask, readable

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_MODULES: dict[str, Backend] = dict(
    zip(BACKENDS, (native.cuda, triton_backend, native.cpu, blocked, reference), strict=True)
)


def backend_status() -> dict[str, str]:
    """Maps every backend's name to `"ready"`, or to the reason why it cannot run here."""
    return {name: module.unavailable_reason() or "ready" for name, module in _MODULES.items()}


def _serve(name: str, problem: RelationInputs, call: Callable[[Backend], _Result]) -> _Result:
    """`call` of the backend `name`; `auto` goes on to the next one where a backend finds only then that it cannot."""
    if name != "auto":
        reasons = _unsupported_reasons(name, problem)
        if reasons:
            usable = ", ".join(n for n, reason in backend_status().items() if reason == "ready")
            raise RuntimeError(f"backend: {name!r} cannot serve this call: {'; '.join(reasons)}. Usable here: {usable}")
        return call(_MODULES[name])
    for candidate in AUTO:
        if not _unsupported_reasons(candidate, problem):
            try:
                return call(_MODULES[candidate])
            except BackendUnavailable as failure:
                _warn_once(f"another backend than {candidate} serves: {failure}")
    raise RuntimeError("backend: none can serve this call")


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _unsupported_reasons(name: str, problem: RelationInputs) -> list[str]:
    """Every reason why a backend does not serve; why `auto` passes one over can be read in the log."""
    missing = _MODULES[name].unavailable_reason()
    reasons = [missing] if missing else _MODULES[name].unsupported_reasons(problem)
    if reasons:
        _log.debug("backend %s does not serve: %s", name, "; ".join(reasons))
    return reasons


_ONCE = "relation_kl: differentiable once, so its gradient, taken with create_graph=True, has no derivative of its own"
_NO_VMAP = "relation_kl: no rule for torch.func.vmap; B is the batch axis, or loop over what is to be mapped"


def relation_values(*arguments) -> Tensor:
    """(R,) or (R, *rows) values of all relations, differentiable in the student's tensors.

    Arguments: pairs, options, attention_mask, cu_seqlens, prefix_lens, the teacher's tensors, the student's tensors.
    """
    transforms = not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
    student = _sides(arguments[5:])[1]
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    return (_RelationKLUnderTransforms if transforms else RelationKL).apply(gradient, *arguments)[0]


def _forward(gradient, pairs, options, attention_mask, cu_seqlens, prefix_lens, *tensors) -> tuple[Tensor, ...]:
    """The values; for a scalar reduction also the gradients, which the backward only scales.

    The gradients are outputs of the autograd node, so differentiating them leads back to the node, which refuses.
    """
    masks = (attention_mask, cu_seqlens, prefix_lens)
    gradient = gradient and options[-2] != "none"
    teacher, student = _sides(tensors)
    values, grads = torch.ops.minilm_kernels.relation_kl(teacher, student, pairs, *masks, *options, gradient)
    return (values, *grads)


def _save(ctx, arguments, outputs) -> None:
    _, ctx.pairs, ctx.options, *kept = arguments
    ctx.set_materialize_grads(False)
    ctx.rows = ctx.options[-2] == "none"
    ctx.dtypes = [x.dtype for x in _sides(kept[3:])[1]]
    if not ctx.rows:
        ctx.save_for_backward(*outputs[1:])
        return
    ctx.unsaved = {}
    if not torch.compiler.is_compiling():  # inference tensors cannot be saved, but do not change outside their mode
        ctx.unsaved = {i: x for i, x in enumerate(kept) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unsaved else x for i, x in enumerate(kept)))


class RelationKL(torch.autograd.Function):
    """The autograd node of `relation_values`."""

    @staticmethod
    def forward(ctx, *arguments):
        outputs = _forward(*arguments)
        _save(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad, *second_derivatives):
        if not torch.compiler.is_compiling() and any(g is not None for g in second_derivatives):
            raise RuntimeError(_ONCE)
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second time is an error
        slots = grad_buffers(_relations(ctx.pairs))
        if ctx.rows:
            kept = [ctx.unsaved.get(i, x) for i, x in enumerate(saved)]
            graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            parts = (_RowsBackward.apply if graph else _rows_backward)(grad, ctx.pairs, ctx.options, *kept)
        elif _is_one(grad):
            parts = [part.detach() for part in saved]
        else:
            parts = [part * grad[r] for part, (r, _) in zip(saved, slots, strict=True)]
        grads: list[Tensor | None] = [None] * len(ctx.dtypes)
        for part, (_, m) in zip(parts, slots, strict=True):
            so_far = grads[m]
            grads[m] = part if so_far is None else so_far + part
        student_grads = (g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, None, None, None, *[None] * len(ctx.dtypes), *student_grads


class _RelationKLUnderTransforms(torch.autograd.Function):
    """`RelationKL` in the form that torch.func and forward-mode AD ask for, which takes longer to call."""

    @staticmethod
    def forward(*arguments):
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    backward = RelationKL.backward

    @staticmethod
    def vmap(*_):
        raise RuntimeError(_NO_VMAP)

    @staticmethod
    def jvp(*_):
        raise RuntimeError("relation_kl: no forward-mode derivative (jvp, jacfwd, hessian); use torch.func.grad")


def _rows_backward(grad, pairs, options, *kept) -> tuple[Tensor, ...]:
    *options, _, backend = options
    teacher, student = _sides(kept[3:])
    return torch.ops.minilm_kernels.relation_kl_rows_backward(
        grad, teacher, student, pairs, *kept[:3], *options, backend
    )


class _RowsBackward(torch.autograd.Function):
    """The backward of rows inside a graph (create_graph): whoever differentiates it is told."""

    @staticmethod
    def forward(*arguments):
        return tuple(_rows_backward(*arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_ONCE)

    @staticmethod
    def vmap(*_):
        raise RuntimeError(_NO_VMAP)


def _is_one(grad: Tensor) -> bool:
    """Whether scaling may be spared: a pass over all gradients, on the CPU several percent of a loss.

    Not where the graph is kept: what is handed on as it is may be added to.
    """
    return (
        readable(grad)
        and not torch.is_grad_enabled()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and set(grad.tolist()) == {1.0}
    )


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
) -> RelationInputs:
    token_shape = tuple(student[0].shape[:-2])
    mask = Mask(token_shape, student[0].device, attention_mask, cu_seqlens, max_seqlen, causal, prefix_lens)
    mask.check_packing()
    return RelationInputs(teacher, student, _relations(pairs), mask, teacher_scale, student_scale)


def _full_precision(device: str) -> AbstractContextManager:
    """Under autocast the products inside a backend would be rounded to half precision."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@torch.library.impl("minilm_kernels::relation_kl", "default")
def _relation_kl(teacher, student, *arguments):
    *inputs, reduction, backend, gradient = arguments
    with _full_precision(student[0].device.type):
        problem = _problem(teacher, student, *inputs)
        if reduction == "none":
            return _serve(backend, problem, lambda module: module.forward_none(problem)), []
        weights = problem.mask.sequence_weights(reduction, problem.heads, problem.dtype)
        return _serve(backend, problem, lambda module: module.forward_reduced(problem, weights, gradient))


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
    with _full_precision(student[0].device.type):
        problem = _problem(teacher, student, *inputs)
        return _serve(backend, problem, lambda module: module.backward_none(problem, row_grads))


@torch.library.register_fake("minilm_kernels::relation_kl_rows_backward")
def _relation_kl_rows_backward_fake(row_grads, teacher, student, pairs, *inputs):
    return _empty_slots(teacher, student, _relations(pairs))


def _empty_slots(teacher, student, relations) -> list[Tensor]:
    dtype = result_dtype(teacher, student)
    return [student[m].new_empty(student[m].shape, dtype=dtype) for _, m in grad_buffers(relations)]
