"""The public call: validation of everything that comes from outside, then one operator call.

`relation_kl` computes one relation, `relation_kl_multi` all relations of a loss at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Real

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from .masks import REDUCTIONS, readable
from .ops import BACKENDS, relation_values

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def relation_kl(
    teacher_query: Tensor,
    teacher_key: Tensor | None,
    student_query: Tensor,
    student_key: Tensor | None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    prefix_lens: Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    reduction: str = "sequence",
    backend: str = "auto",
) -> Tensor:
    """KL divergence between a teacher's and a student's attention relation, without an S×S matrix in memory.

    With R = softmax(scale · X Yᵀ) over the keys that a row sees (MiniLM, arXiv 2002.10957, equations 5 to 8;
    MiniLMv2, arXiv 2012.15828, equations 6 to 8):

        KL[b, a, i] = Σ_j R_t[b, a, i, j] · (log R_t[b, a, i, j] − log R_s[b, a, i, j])

    Differentiable in the student's tensors, once: differentiating the gradient again is an error. The gradient of a
    scalar reduction is computed in the forward. torch.func.grad and vjp work; vmap and forward mode are refused.

    Args:
        teacher_query, teacher_key: (B, S, A, D_t), or packed (T, A, D_t); float16, bfloat16, float32 or float64, any
            strides. Must not require grad; may come from inference_mode. Key None: the key is the query.
        student_query, student_key: (B, S, A, D_s), or packed (T, A, D_s), likewise. D_s need not equal D_t, and the
            student's dtype need not be the teacher's. Where the key is the query on both sides, None, the same tensor
            or the same view of the same tensor, this is a self relation, which is faster. Of two views the query then
            has the gradient of both. A traced call sees only that tensors are the same, not that views are.
        attention_mask: (B, S) bool or integer, nonzero marks real tokens, any pattern; or floats of 0 and 1. The others
            are neither keys nor rows, and their values never matter, NaN included. Dense inputs only. An additive mask
            (0 and large negative numbers) and segment numbers (1 1 2 2) are errors where values can be read without
            waiting: on a CPU, outside torch.compile. Elsewhere floats other than 0 and 1 make the result NaN, and
            nonzero integers are real tokens, whatever they are.
        cu_seqlens: (N + 1,) int32, the bounds of the N sequences in a packed batch, from 0 to T. Required for packed
            inputs. Malformed bounds are a ValueError on a CPU; on a GPU the backends `cuda` and `triton` do not wait
            for them, and values and gradients are NaN.
        max_seqlen: length of the longest packed sequence or more; a bound that some backends work faster with. A
            sequence that is longer is answered as malformed bounds are.
        causal: row i sees the keys j ≤ i.
        prefix_lens: (B,), packed (N,), integer: row i sees j < prefix_lens[b] or j ≤ i (UniLM sequence-to-sequence).
            Positions count from the start of the sequence, padding included. `causal` beside it changes nothing.
        teacher_scale, student_scale: factor of the scores, a number; None: 1/sqrt(D_t), 1/sqrt(D_s).
        reduction: "sequence": mean over heads and real rows of each sequence, then over the sequences that have any;
            "token": mean over heads and real rows of the batch; "sum": sum over heads and rows; "none": every row.
        backend: "auto", or one of `backend_status()`.

    Returns:
        Scalar, or with reduction "none" (B, A, S), packed (A, T), with 0 on rows that are not real; in nats, float32,
        or float64 if an input is float64.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it.
        RuntimeError: the backend asked for cannot serve the call (the message gives every reason), or a derivative was
            asked for that there is not.
    """
    teacher, student = {"query": teacher_query}, {"query": student_query}
    pair = ("query", "query")
    keys = (
        teacher_query if teacher_key is None else teacher_key,
        student_query if student_key is None else student_key,
    )
    if keys[0] is not teacher_query or keys[1] is not student_query:
        teacher["key"], student["key"] = keys
        pair = ("query", "key")
    return relation_kl_multi(
        teacher,
        student,
        [pair],
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        causal=causal,
        prefix_lens=prefix_lens,
        teacher_scale=teacher_scale,
        student_scale=student_scale,
        reduction=reduction,
        backend=backend,
    ).squeeze(0)


def relation_kl_multi(
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    relations: Sequence[tuple[str, str]],
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = False,
    prefix_lens: Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    reduction: str = "sequence",
    backend: str = "auto",
) -> Tensor:
    """`relation_kl` of several relations, (query name, key name) into `teacher` and `student`, in one operator call.

    Returns (R,), or with reduction "none" (R, B, A, S), packed (R, A, T); every entry is differentiable by itself.
    """
    token_shape, device = _check_tensors(teacher, student, relations, packed=cu_seqlens is not None)
    _check_masks(token_shape, device, attention_mask, cu_seqlens, max_seqlen, causal, prefix_lens)
    _check_scale("teacher_scale", teacher_scale)
    _check_scale("student_scale", student_scale)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")

    factor = None
    if attention_mask is not None and attention_mask.is_floating_point():
        if not readable(attention_mask):  # no error can be raised, but the result can say so
            zero_or_one = ((attention_mask == 0) | (attention_mask == 1)).all()
            factor = torch.where(zero_or_one, 1.0, torch.nan)
        attention_mask = attention_mask != 0
    pairs = [
        (query, query)
        if _one_tensor(teacher[query], teacher[key]) and _one_tensor(student[query], student[key])
        else (query, key)
        for query, key in relations
    ]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    scales = (None if scale is None else float(scale) for scale in (teacher_scale, student_scale))
    values = relation_values(
        [names.index(name) for pair in pairs for name in pair],
        (max_seqlen, causal, *scales, reduction, backend),
        attention_mask,
        cu_seqlens,
        prefix_lens,
        *(side[name] for side in (teacher, student) for name in names),
    )
    return values if factor is None else values * factor


def _one_tensor(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are one: the same, or equal views of one memory whose gradients go the same way.

    Not asked of traced tensors, which do not say where they lie.
    """
    if x is y:
        return True
    if torch.compiler.is_compiling() or type(x) is not Tensor or type(y) is not Tensor:
        return False
    return (
        x.shape == y.shape
        and x.dtype == y.dtype
        and x.stride() == y.stride()
        and not torch._C._are_functorch_transforms_active()
        and x.data_ptr() == y.data_ptr()
        and x.is_neg() == y.is_neg()
        and (not torch.is_grad_enabled() or _one_graph(x, y))
    )


def _one_graph(x: Tensor, y: Tensor) -> bool:
    """Whether autograd leads the gradients of two views, if any, through the same operations to one place."""
    if not x.requires_grad and not y.requires_grad:
        return True
    if any(z._backward_hooks or z.retains_grad for z in (x, y)):
        return False
    one, other = (x.grad_fn, x.output_nr), (y.grad_fn, y.output_nr)
    while one != other:
        (node, index), (other_node, other_index) = one, other
        if node is None or other_node is None or index != other_index or type(node) is not type(other_node):
            return False
        if isinstance(node, BackwardCFunction) or len(node.next_functions) != 1:
            return False
        arguments = [[getattr(n, name) for name in _saved_names(type(node))] for n in (node, other_node)]
        if any(isinstance(value, Tensor) for value in arguments[0]) or arguments[0] != arguments[1]:
            return False
        (one,), (other,) = node.next_functions, other_node.next_functions
    return one[0] is not None


@cache
def _saved_names(node: type) -> list[str]:
    """What a node of autograd keeps: for a view, where it begins and its sizes."""
    return [name for name in dir(node) if name.startswith("_saved_")]


def _check_tensors(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], relations: Sequence[tuple[str, str]], packed: bool
) -> tuple[tuple[int, ...], torch.device]:
    """Returns (B, S), or (T,) for packed inputs, and the device."""
    named = {f"teacher_{name}": x for name, x in teacher.items()} | {
        f"student_{name}": x for name, x in student.items()
    }
    for name, x in named.items():
        check_kind(name, x)
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        layout = (
            "packed (T, A, D), because cu_seqlens is given" if packed else "(B, S, A, D), or packed with cu_seqlens"
        )
        if x.dim() != (3 if packed else 4):
            raise ValueError(f"{name}: expected shape {layout}, got {tuple(x.shape)}")
        if x.shape[-2] == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one head of width 1 or more, got shape {tuple(x.shape)}")
    first_name, first = next(iter(named.items()))
    for name, x in named.items():
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"{name}: expected the batch, sequence and head sizes of {first_name}, {tuple(first.shape[:-1])}, "
                f"got shape {tuple(x.shape)}"
            )
        if x.device != first.device:
            raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {x.device}")
    for query, key in relations:
        for side, tensors in (("teacher", teacher), ("student", student)):
            width, other = tensors[query].shape[-1], tensors[key].shape[-1]
            if width != other:
                raise ValueError(
                    f"{side}_{key}: expected the head width of {side}_{query}, {width}, got {other}; a relation needs "
                    "equal widths (grouped-query models have narrower keys and values: leave out the mixed relations)"
                )
    for name, x in teacher.items():
        if x.requires_grad:
            raise ValueError(
                f"teacher_{name}: expected a tensor that does not require grad, got one that does; the teacher gets no "
                "gradient: run it under torch.no_grad() or pass teacher.detach()"
            )
    return tuple(first.shape[:-2]), first.device


def check_kind(name: str, x: object) -> None:
    """Refuses what is no tensor, and the kinds of tensors that are not one dense block of numbers on one device."""
    if type(x) is Tensor and x.layout is torch.strided and not x.is_nested and not x.is_quantized:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    found = way_out = None
    if x.is_nested:
        found = "a nested tensor"
        way_out = "its values() with cu_seqlens=offsets().int(), both of the layout torch.jagged"
    elif x.layout is not torch.strided:
        found, way_out = f"one of the layout {x.layout}", "its to_dense()"
    elif x.is_quantized:
        found, way_out = "a quantized one", "its dequantize()"
    elif type(x).__name__ == "DTensor":
        found, way_out = "a DTensor", "its to_local() where batch or heads are sharded, else its full_tensor()"
    elif type(x).__name__ == "MaskedTensor":
        found, way_out = "a MaskedTensor", "its get_data(), and the mask of tokens as attention_mask"
    if found:
        raise TypeError(f"{name}: expected a dense tensor, got {found}: pass {way_out}")


def _check_mask_values(mask: Tensor) -> None:
    """Refuses what is not a mask of 0 and one other number; additive masks and segment numbers by their names."""
    if mask.dtype == torch.bool or not mask.numel() or not readable(mask):
        return
    low, high = (x.item() for x in mask.aminmax())
    if not mask.is_floating_point() and low >= 0 and high <= 1:
        return
    marks = mask[mask != 0]
    if mask.is_floating_point() and bool((marks == 1).all()):
        return
    if not mask.is_floating_point() and low >= -1 and bool((marks == marks[0]).all()):
        return
    shown = f"numbers from {low} to {high}"
    if low < 0:
        looks = ", as an additive mask has: pass mask == 0, True on real tokens"
    elif bool((mask == mask.round()).all()):
        looks = ", as segment numbers are: pack the segments and pass cu_seqlens"
    else:
        looks = ""
    expected = "floats of 0 and 1" if mask.is_floating_point() else "0 and one other number"
    raise ValueError(f"attention_mask: expected bool, or {expected}, nonzero on real tokens, got {shown}{looks}")


def _check_masks(
    token_shape: tuple[int, ...],
    device: torch.device,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    prefix_lens: Tensor | None,
) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    masks = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "prefix_lens": prefix_lens}
    for name, mask in masks.items():
        if mask is None:
            continue
        check_kind(name, mask)
        floats = _DTYPES if name == "attention_mask" else ()
        if mask.dtype not in _INTEGERS and mask.dtype not in floats:
            raise TypeError(f"{name}: expected an integer or bool dtype, got {mask.dtype}")
        if mask.device != device:
            raise ValueError(f"{name}: expected the device of the other tensors, {device}, got {mask.device}")
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask: expected None for packed inputs (cu_seqlens says what is real), got a tensor")
    if attention_mask is not None and tuple(attention_mask.shape) != token_shape:
        raise ValueError(f"attention_mask: expected shape (B, S) = {token_shape}, got {tuple(attention_mask.shape)}")
    if attention_mask is not None:
        _check_mask_values(attention_mask)
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}: pass cu_seqlens.int()")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: expected shape (N + 1,), got {tuple(cu_seqlens.shape)}")
    if max_seqlen is not None:
        if cu_seqlens is None:
            raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen}")
        if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt):
            raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
        if max_seqlen < 0:
            raise ValueError(f"max_seqlen: expected 0 or more, got {max_seqlen}")
    if prefix_lens is not None:
        sequences = token_shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if prefix_lens.dtype == torch.bool:
            raise TypeError("prefix_lens: expected integers, got torch.bool")
        if tuple(prefix_lens.shape) != (sequences,):
            raise ValueError(
                f"prefix_lens: expected one integer a sequence, shape ({sequences},), got {tuple(prefix_lens.shape)}"
            )


def _check_scale(name: str, scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        way_out = ""
        if isinstance(scale, Tensor):
            side = name.removesuffix("_scale")
            way_out = f": pass its .item(); where it is learned, multiply {side}_query by it and give {side}_key too"
        raise TypeError(f"{name}: expected a number or None, got {type(scale).__name__}{way_out}")
    if not math.isfinite(scale):
        raise ValueError(f"{name}: expected a finite number, got {scale}")
