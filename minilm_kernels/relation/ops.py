"""PyTorch operators, their fake kernels, and the autograd function around them.

Two operators are registered, both opaque to torch.compile. `relation_kl` returns the values and, for a reduced loss,
also the gradients of the student's tensors. `relation_kl_rows_backward` computes the gradients of `reduction="none"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from minilm_kernels._choices import BackendName, Reduction

from . import dispatch
from .costs import Work
from .inputs import RelationInputs, Scaling, grad_buffers, result_dtype
from .masks import Mask, has_values, host_readable


class Options(NamedTuple):
    """Arguments of a call that are not tensors, in the order of the operators' schema."""

    max_seqlen: int | None = None
    causal: bool = False
    teacher_scale: float | None = None
    student_scale: float | None = None
    reduction: Reduction = "sequence"
    backend: BackendName = "auto"
    weights: tuple[float, ...] | None = None  # weights of the relations in their sum


_NUM_MASKS = 4  # tensors among the masks: attention_mask, cu_seqlens, prefix_lens, query_mask
_DOUBLE_BACKWARD = "relation_kl: differentiable once; its gradient, taken with create_graph=True, has no derivative"
_NO_VMAP = "relation_kl: no rule for torch.func.vmap; use the batch axis B, or a loop"
_NO_JVP = "relation_kl: no forward-mode derivative (jvp, jacfwd, hessian); use torch.func.grad"


def relation_values(
    pairs: list[int],
    options: Options,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    prefix_lens: Tensor | None,
    query_mask: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """Returns the values of all relations, (R,) or (R, *rows), or their weighted sum.

    The result is differentiable in the student's tensors.

    Args:
        pairs: for each relation, the index of its query tensor and that of its key tensor, in one flat list.
        options: arguments that are not tensors.
        attention_mask: see `relation_kl`.
        cu_seqlens: see `relation_kl`.
        prefix_lens: see `relation_kl`.
        query_mask: see `relation_kl`.
        *tensors: the teacher's tensors, then equally many of the student's.
    """
    transforms = not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors[len(tensors) // 2 :])
    function = _RelationKLForTransforms if transforms else RelationKL
    return function.apply(gradient, pairs, options, attention_mask, cu_seqlens, prefix_lens, query_mask, *tensors)[0]


def _forward(
    gradient: bool, pairs: list[int], options: Options, *masks_and_tensors: Tensor | None
) -> tuple[Tensor, ...]:
    """Returns the values and, for a reduced loss, the gradients. The backward only scales these gradients.

    The gradients are outputs of the autograd node. A second derivative therefore calls the node again, and the node
    raises an error.
    """
    masks, teacher, student = _split(masks_and_tensors)
    *schema_options, weights = options
    gradient = gradient and options.reduction != "none"
    values, grads = torch.ops.minilm_kernels.relation_kl(
        teacher, student, pairs, *masks, *schema_options, gradient, None if weights is None else list(weights)
    )
    return (values, *grads)


def _save(ctx: Any, arguments: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    _, ctx.pairs, ctx.options, *kept = arguments
    ctx.set_materialize_grads(False)
    ctx.rows = ctx.options.reduction == "none"
    ctx.dtypes = [x.dtype for x in _split(kept)[2]]
    if not ctx.rows:
        ctx.save_for_backward(*outputs[1:])
        return
    ctx.unsaved = {}
    if not torch.compiler.is_compiling():
        # Inference tensors cannot be saved for backward. They are kept directly, which is safe: they cannot be changed
        # outside inference mode.
        ctx.unsaved = {i: x for i, x in enumerate(kept) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unsaved else x for i, x in enumerate(kept)))


class RelationKL(torch.autograd.Function):
    """The autograd function of `relation_values`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        outputs = _forward(*arguments)
        _save(ctx, arguments, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *second_derivatives: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling() and any(g is not None for g in second_derivatives):
            raise RuntimeError(_DOUBLE_BACKWARD)
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # read once: activation checkpointing refuses a second read
        buffers = grad_buffers(_relations(ctx.pairs))
        if ctx.rows:
            kept = [ctx.unsaved.get(i, x) for i, x in enumerate(saved)]
            graph = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            parts = (_RowsBackward.apply if graph else _rows_backward)(grad, ctx.pairs, ctx.options, *kept)
            grads = _sums(parts, buffers, ctx.dtypes)
        else:
            grads = _scaled(grad, ctx.options, saved, buffers, ctx.dtypes)
        return *[None] * (3 + _NUM_MASKS + len(ctx.dtypes)), *grads


class _RelationKLForTransforms(torch.autograd.Function):
    """`RelationKL` in the form that torch.func and forward-mode AD require. It is slower to call."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)

    backward = RelationKL.backward

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise RuntimeError(_NO_VMAP)

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise RuntimeError(_NO_JVP)


def _rows_backward(grad: Tensor, pairs: list[int], options: Options, *kept: Any) -> tuple[Tensor, ...]:
    *schema_options, _, backend, _ = options
    masks, teacher, student = _split(kept)
    return torch.ops.minilm_kernels.relation_kl_rows_backward(
        grad, teacher, student, pairs, *masks, *schema_options, backend
    )


class _RowsBackward(torch.autograd.Function):
    """The backward of `reduction="none"` under create_graph=True. Differentiating it raises an error."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_rows_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_DOUBLE_BACKWARD)

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise RuntimeError(_NO_VMAP)


def _scaled(
    grad: Tensor,
    options: Options,
    saved: Sequence[Tensor],
    buffers: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor | None]:
    """Returns the gradient of each student tensor from the stored gradients and the upstream gradient.

    On a GPU this is one launch, which needs no memory besides its results. Graphs of torch.compile and of
    create_graph=True contain PyTorch's operators instead.
    """
    grads = None if torch.is_grad_enabled() else _scaled_by_a_kernel(grad, options, saved, buffers, dtypes)
    if grads is not None:
        return grads
    factors = list(grad.unbind()) if options.weights is None else [grad * weight for weight in options.weights]
    skips = _can_skip_scaling(factors)
    parts = [part.detach() if skips else part * factors[r] for part, (r, _) in zip(saved, buffers, strict=True)]
    return _sums(parts, buffers, dtypes)


def _scaled_by_a_kernel(
    grad: Tensor,
    options: Options,
    saved: Sequence[Tensor],
    buffers: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor | None] | None:
    """Does the work of `_scaled` by a kernel of a backend, or returns None if no backend has one for these tensors."""
    if not has_values(grad) or torch._C._are_functorch_transforms_active():
        return None
    order = sorted(range(len(buffers)), key=lambda p: buffers[p][1])
    relations, owners = ([buffers[p][k] for p in order] for k in (0, 1))
    used = list(dict.fromkeys(owners))
    scaling = Scaling(
        grad,
        [saved[p].detach() for p in order],
        relations,
        [1.0 if options.weights is None else options.weights[r] for r in relations],
        [used.index(m) for m in owners],
        [dtypes[m] for m in used],
    )
    results = dispatch.scale(options.backend, scaling)
    if results is None:
        return None
    by_tensor = dict(zip(used, results, strict=True))
    return [by_tensor.get(m) for m in range(len(dtypes))]


def _sums(
    parts: Sequence[Tensor], buffers: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Returns the sum of each student tensor's parts in the tensor's dtype."""
    grads: list[Tensor | None] = [None] * len(dtypes)
    for part, (_, m) in zip(parts, buffers, strict=True):
        so_far = grads[m]
        grads[m] = part if so_far is None else so_far + part
    return [g if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]


def _can_skip_scaling(factors: Sequence[Tensor]) -> bool:
    """Returns whether the stored gradients can be returned without scaling, because all factors are 1.

    Scaling is one pass over all gradients; on the CPU it takes several percent of the time of a loss. If the graph is
    retained, the stored gradients must not be returned, since the caller may add to them in place.
    """
    return (
        host_readable(factors[0])
        and not torch.is_grad_enabled()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and all(factor.item() == 1.0 for factor in factors)
    )


def _split(masks_and_tensors: Sequence[Any]) -> tuple[Sequence[Tensor | None], list[Tensor], list[Tensor]]:
    """Returns the masks, the teacher's tensors and the student's."""
    masks, tensors = masks_and_tensors[:_NUM_MASKS], masks_and_tensors[_NUM_MASKS:]
    half = len(tensors) // 2
    return masks, list(tensors[:half]), list(tensors[half:])


def _relations(pairs: list[int]) -> list[tuple[int, int]]:
    return list(zip(pairs[::2], pairs[1::2], strict=True))


_SCHEMA_INPUTS = (
    "Tensor[] teacher, Tensor[] student, int[] pairs, "
    "Tensor? attention_mask, Tensor? cu_seqlens, Tensor? prefix_lens, Tensor? query_mask, "
    "SymInt? max_seqlen, bool causal, float? teacher_scale, float? student_scale"
)
torch.library.define(
    "minilm_kernels::relation_kl",
    f"({_SCHEMA_INPUTS}, str reduction, str backend, bool gradient, float[]? weights) -> (Tensor, Tensor[])",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "minilm_kernels::relation_kl_rows_backward",
    f"(Tensor row_grads, {_SCHEMA_INPUTS}, str backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _inputs(
    teacher: list[Tensor],
    student: list[Tensor],
    pairs: list[int],
    masks: Sequence[Tensor | None],
    options: Options,
) -> RelationInputs:
    attention_mask, cu_seqlens, prefix_lens, query_mask = masks
    mask = Mask(
        tuple(student[0].shape[:-2]),
        student[0].device,
        attention_mask,
        cu_seqlens,
        options.max_seqlen,
        options.causal,
        prefix_lens,
        query_mask,
    )
    mask.check_packing()
    return RelationInputs(
        teacher,
        student,
        _relations(pairs),
        mask,
        options.teacher_scale,
        options.student_scale,
        options.weights,
    )


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Turns autocast off, which would round the products inside a backend to half precision."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@torch.library.impl("minilm_kernels::relation_kl", "default")
def _relation_kl(
    teacher: list[Tensor], student: list[Tensor], pairs: list[int], *arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    masks, (*schema_options, gradient, weights) = arguments[:_NUM_MASKS], arguments[_NUM_MASKS:]
    options = Options(*schema_options)._replace(weights=weights)
    with _without_autocast(student[0].device.type):
        inputs = _inputs(teacher, student, pairs, masks, options)
        if options.reduction == "none":
            return dispatch.run(options.backend, inputs, "evaluation", lambda backend: backend.forward_none(inputs)), []
        work: Work = "training" if gradient else "evaluation"
        return dispatch.run(
            options.backend, inputs, work, lambda backend: backend.forward_reduced(inputs, options.reduction, gradient)
        )


@torch.library.register_fake("minilm_kernels::relation_kl")
def _relation_kl_fake(
    teacher: list[Tensor], student: list[Tensor], pairs: list[int], *arguments: Any
) -> tuple[Tensor, list[Tensor]]:
    *_, reduction, _, gradient, weights = arguments
    relations = _relations(pairs)
    *batch, positions, heads, _ = student[pairs[0]].shape
    shape = (len(relations), *batch, heads, positions) if reduction == "none" else (len(relations),)
    shape = shape if weights is None else ()
    values = student[0].new_empty(shape, dtype=result_dtype(teacher, student))
    return values, _empty_grads(teacher, student, relations) if gradient and reduction != "none" else []


@torch.library.impl("minilm_kernels::relation_kl_rows_backward", "default")
def _relation_kl_rows_backward(
    row_grads: Tensor, teacher: list[Tensor], student: list[Tensor], pairs: list[int], *arguments: Any
) -> list[Tensor]:
    *masks, max_seqlen, causal, teacher_scale, student_scale, backend = arguments
    options = Options(max_seqlen, causal, teacher_scale, student_scale, "none", backend)
    with _without_autocast(student[0].device.type):
        inputs = _inputs(teacher, student, pairs, masks, options)
        return dispatch.run(
            options.backend, inputs, "rows gradient", lambda backend: backend.backward_none(inputs, row_grads)
        )


@torch.library.register_fake("minilm_kernels::relation_kl_rows_backward")
def _relation_kl_rows_backward_fake(
    row_grads: Tensor, teacher: list[Tensor], student: list[Tensor], pairs: list[int], *arguments: Any
) -> list[Tensor]:
    return _empty_grads(teacher, student, _relations(pairs))


def _empty_grads(teacher: list[Tensor], student: list[Tensor], relations: Sequence[tuple[int, int]]) -> list[Tensor]:
    dtype = result_dtype(teacher, student)
    return [student[m].new_empty(student[m].shape, dtype=dtype) for _, m in grad_buffers(relations)]
