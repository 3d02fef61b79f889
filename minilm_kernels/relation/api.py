"""Public functions: each validates its arguments. The relations call one operator.

`relation_kl` computes one relation, and `relation_kl_multi` computes all relations of a loss at once. `prefix_mask`
gives models the mask of `prefix_lens`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from minilm_kernels._choices import BACKENDS, REDUCTIONS, BackendName, Reduction

from .masks import Mask, host_readable
from .ops import Options, relation_values

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    query_mask: Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    reduction: Reduction = "sequence",
    backend: BackendName = "auto",
) -> Tensor:
    """Computes KL(teacher ‖ student) between attention relations, without an S×S matrix in memory.

    A relation is R = softmax(scale · Q Kᵀ), over the keys that each row sees. The divergence of row i in head a of
    sequence b is

        KL[b, a, i] = Σ_j R_t[b, a, i, j] · (log R_t[b, a, i, j] − log R_s[b, a, i, j])

    (MiniLM, arXiv 2002.10957, equations 5 to 8; MiniLMv2, arXiv 2012.15828, equations 6 to 8). A reduced loss is the
    mean or sum over the rows that count: valid tokens that `query_mask` does not leave out.

    The result is differentiable once with respect to the student's tensors. A reduced loss computes its gradient in the
    forward pass. torch.func.grad and torch.func.vjp are supported; vmap, forward-mode derivatives and double backward
    raise an error.

    Args:
        teacher_query: (B, S, A, D_t), or packed (T, A, D_t); float16, bfloat16, float32 or float64, with any strides.
            The teacher's tensors must not require grad; they may be inference tensors.
        teacher_key: like `teacher_query`, or (B, S, A_k, D_t) with fewer heads, as in grouped-query attention: A_k
            divides A, and query head a reads key head a // (A / A_k). The result is that of
            `key.repeat_interleave(A // A_k, dim=-2)`. If both keys are None, the call is a self relation: the queries
            are also the keys.
        student_query: (B, S, A, D_s), or packed (T, A, D_s). Width and dtype may differ from the teacher's.
        student_key: like `student_query`, also with fewer heads, whose number may differ from the teacher's. Its
            gradient has its own shape. None if and only if `teacher_key` is None. To use the query as key in one model
            only, pass that model's query as its key, too. If both models' keys are the same tensors as their queries,
            or equal views of the same tensors, the call is treated as a self relation, which is faster; the gradient of
            two equal student views then goes through `student_query` only. Under tracing, equal views are not
            recognised.
        attention_mask: (B, S), nonzero on valid tokens: bool, integers, or floats of 0 and 1. For dense inputs only.
            Padding may be at any position; the values of padded tokens never matter, not even NaN. On the CPU and
            outside torch.compile, additive masks (0 and large negative numbers) and segment numbers (1 1 2 2) raise an
            error. In all other cases the host does not read the mask: floats other than 0 and 1 make the result NaN,
            and every nonzero integer marks a valid token.
        cu_seqlens: (N + 1,) int32, the bounds of N packed sequences, from 0 to T. Required for packed inputs. Malformed
            bounds raise ValueError on the CPU. On a GPU, the backends `cuda` and `triton` do not wait for the bounds,
            and malformed bounds make the result and the gradients NaN.
        max_seqlen: upper bound of the packed sequences' lengths, which some backends use. A longer sequence is treated
            like malformed bounds.
        causal: if True, row i sees only the keys j ≤ i.
        prefix_lens: (B,), or packed (N,), integers: row i of sequence b sees key j if j ≤ i or j < prefix_lens[b]
            (UniLM's sequence-to-sequence mask). Positions count from the start of the sequence and include padding.
            With `prefix_lens`, `causal` has no effect.
        query_mask: (B, S), or packed (T,), nonzero on rows that count, of the same dtypes as `attention_mask`: for
            instance True on the tokens of completions. A valid token that is left out is still a key that other rows
            see. Its own row adds nothing to loss and gradient and is not counted in averages; in a cross relation, its
            query never matters, not even NaN. The values are checked like those of `attention_mask`.
        teacher_scale: factor of the teacher's scores. None: 1 / sqrt(D_t).
        student_scale: factor of the student's scores. None: 1 / sqrt(D_s).
        reduction: "sequence" averages over heads and counted rows of each sequence, then over the sequences that have
            such rows; "token" averages over heads and counted rows of the batch; "sum" adds up heads and counted rows;
            "none" returns every row.
        backend: "auto", or a name from `backend_status()`.

    Returns:
        The KL divergence in nats: a scalar, or with reduction "none" (B, A, S), packed (A, T), with 0 on rows that do
        not count. The dtype is float32, or float64 if any input is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. The message names the argument.
        ValueError: an argument has a wrong shape or value, or only one key is None. The message names the argument.
        RuntimeError: the requested backend cannot serve the call (the message gives every reason), or an unsupported
            derivative is requested.

    Example:
        >>> import torch
        >>> from minilm_kernels import relation_kl
        >>> _ = torch.manual_seed(0)
        >>> teacher = torch.randn(2, 6, 3, 8)  # B = 2, S = 6, A = 3, D_t = 8
        >>> student = torch.randn(2, 6, 3, 4, requires_grad=True)  # D_s = 4
        >>> mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
        >>> loss = relation_kl(teacher, None, student, None, attention_mask=mask)
        >>> loss.backward()
        >>> f"{loss.item():.3f}", student.grad.shape
        ('0.443', torch.Size([2, 6, 3, 4]))
        >>> relation_kl(teacher, None, student, None, attention_mask=mask, reduction="none").shape
        torch.Size([2, 3, 6])
        >>> rows = torch.arange(6) >= 2  # the first two tokens are a prompt: they are keys, but do not count as rows
        >>> completion = relation_kl(teacher, None, student, None, causal=True, query_mask=rows.expand(2, 6))
        >>> key_t, key_s = torch.randn(2, 6, 1, 8), torch.randn(2, 6, 1, 4)  # one key head for three query heads
        >>> grouped = relation_kl(teacher, key_t, student, key_s, attention_mask=mask)
    """
    if (teacher_key is None) != (student_key is None):
        missing, given = ("teacher", "student") if teacher_key is None else ("student", "teacher")
        raise ValueError(
            f"{missing}_key: expected a tensor, because {given}_key is given, got None; pass both keys, or None for "
            f"both to relate each query to itself. To do so in one model only, pass {missing}_query as {missing}_key"
        )
    teacher, student = {"query": teacher_query}, {"query": student_query}
    pair = ("query", "query")
    if teacher_key is not None and student_key is not None:
        teacher["key"], student["key"] = teacher_key, student_key
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
        query_mask=query_mask,
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
    query_mask: Tensor | None = None,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    weights: Sequence[float] | None = None,
    reduction: Reduction = "sequence",
    backend: BackendName = "auto",
) -> Tensor:
    """Computes `relation_kl` of several relations in one operator call.

    Args:
        teacher: the teacher's tensors by name, each (B, S, A, D_t) or packed (T, A, D_t). Widths may differ between
            tensors, but query and key of one relation must have equal widths. All queries have the same number of heads
            A; tensors that are only keys may have fewer heads, as in `relation_kl`.
        student: the student's tensors under the same names, each (B, S, A, D_s) or packed (T, A, D_s).
        relations: the names of the query tensor and the key tensor of each of the R relations.
        attention_mask: see `relation_kl`.
        cu_seqlens: see `relation_kl`.
        max_seqlen: see `relation_kl`.
        causal: see `relation_kl`.
        prefix_lens: see `relation_kl`.
        query_mask: see `relation_kl`.
        teacher_scale: see `relation_kl`.
        student_scale: see `relation_kl`.
        weights: (R,), the weight of each relation in their sum; None for a value of each relation. Not for reduction
            "none".
        reduction: see `relation_kl`.
        backend: see `relation_kl`.

    Returns:
        (R,), or with reduction "none" (R, B, A, S), packed (R, A, T). Each relation's values can be differentiated
        separately. With `weights`, a scalar.

    Raises:
        TypeError: see `relation_kl`.
        ValueError: see `relation_kl`.
        RuntimeError: see `relation_kl`.

    Example:
        >>> import torch
        >>> from minilm_kernels.relation import relation_kl_multi
        >>> _ = torch.manual_seed(0)
        >>> teacher = {name: torch.randn(2, 6, 3, 8) for name in "qkv"}
        >>> student = {name: torch.randn(2, 6, 3, 4) for name in "qkv"}
        >>> relation_kl_multi(teacher, student, [("q", "k"), ("v", "v")])  # MiniLM's two relations
        tensor([0.9393, 0.5509])
    """
    token_shape, device = _check_tensors(teacher, student, relations, packed=cu_seqlens is not None)
    _check_masks(token_shape, device, attention_mask, cu_seqlens, max_seqlen, causal, prefix_lens, query_mask)
    _check_scale("teacher_scale", teacher_scale)
    _check_scale("student_scale", student_scale)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend: expected auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    if weights is not None and (reduction == "none" or len(weights) != len(relations)):
        expected = 'None with reduction "none"' if reduction == "none" else f"one number per relation, {len(relations)}"
        raise ValueError(f"weights: expected {expected}, got {weights!r}")
    for weight in weights or ():
        _check_weight(weight)

    attention_mask, query_mask, factor = _without_floats(attention_mask, query_mask)
    pairs = [
        (query, query)
        if _same_tensor(teacher[query], teacher[key]) and _same_tensor(student[query], student[key])
        else (query, key)
        for query, key in relations
    ]
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    scale_t, scale_s = (None if scale is None else float(scale) for scale in (teacher_scale, student_scale))
    values = relation_values(
        [names.index(name) for pair in pairs for name in pair],
        Options(max_seqlen, causal, scale_t, scale_s, reduction, backend, None if weights is None else tuple(weights)),
        attention_mask,
        cu_seqlens,
        prefix_lens,
        query_mask,
        *(model[name] for model in (teacher, student) for name in names),
    )
    return values if factor is None else values * factor


def prefix_mask(attention_mask: Tensor, prefix_lens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns UniLM's sequence-to-sequence mask in the form that models of transformers take.

    A model that gets it as `attention_mask` lets row i of sequence b see the keys that it sees in `relation_kl` with
    the same `attention_mask` and `prefix_lens`: valid keys with j ≤ i or j < prefix_lens[b]. Models whose attention
    implementation is "sdpa" or "eager" take it, encoders and decoders; they derive no position ids from it.

    Args:
        attention_mask: (B, S), nonzero on valid tokens.
        prefix_lens: (B,) integers, the length of each prefix; positions include padding.
        dtype: floating-point dtype of the mask, that of the model.

    Returns:
        (B, 1, S, S), 0 where row i sees key j, otherwise -65504, which also float16 can represent.

    Raises:
        TypeError: an argument is not a tensor, or has a wrong dtype.
        ValueError: an argument has a wrong shape, or they are on different devices.

    Example:
        >>> import torch
        >>> from minilm_kernels import prefix_mask
        >>> prefix_mask(torch.tensor([[1, 1, 1, 0]]), torch.tensor([2])).eq(0).int()
        tensor([[[[1, 1, 0, 0],
                  [1, 1, 0, 0],
                  [1, 1, 1, 0],
                  [0, 0, 0, 0]]]], dtype=torch.int32)
    """
    check_dense("attention_mask", attention_mask)
    check_dense("prefix_lens", prefix_lens)
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected shape (B, S), got {tuple(attention_mask.shape)}")
    shape, device = tuple(attention_mask.shape), attention_mask.device
    _check_masks(shape, device, attention_mask, None, None, False, prefix_lens, None)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    visible = Mask(shape, device, attention_mask, prefix_lens=prefix_lens).dense()[:, None]
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(torch.float16).min)


def _same_tensor(x: Tensor, y: Tensor) -> bool:
    """Returns whether x and y are one tensor, or equal views of the same memory whose gradients take the same path.

    Views of traced tensors are not recognised, because traced tensors have no address.
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
        and (not torch.is_grad_enabled() or _same_gradient_path(x, y))
    )


def _same_gradient_path(x: Tensor, y: Tensor) -> bool:
    """Returns whether autograd passes the gradients of two views through the same operations to the same node.

    Views that both need no gradient count as the same.
    """
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
    """Returns the names of the arguments that an autograd node saves: for a view, its offset and sizes."""
    return [name for name in dir(node) if name.startswith("_saved_")]


def _check_tensors(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], relations: Sequence[tuple[str, str]], packed: bool
) -> tuple[tuple[int, ...], torch.device]:
    """Checks the tensors and returns their token shape, (B, S) or packed (T,), and their device."""
    named = {f"teacher_{name}": x for name, x in teacher.items()} | {
        f"student_{name}": x for name, x in student.items()
    }
    for name, x in named.items():
        check_dense(name, x)
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
        layout = (
            "packed (T, A, D), because cu_seqlens is given" if packed else "(B, S, A, D), or packed with cu_seqlens"
        )
        if x.dim() != (3 if packed else 4):
            raise ValueError(f"{name}: expected shape {layout}, got {tuple(x.shape)}")
        if x.shape[-2] == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name}: expected at least one head of width 1 or more, got shape {tuple(x.shape)}")
    first_name = f"teacher_{relations[0][0]}"
    first = named[first_name]
    for name, x in named.items():
        if x.shape[:-1] != first.shape[:-1]:
            _check_sizes(name, x, first_name, first, relations)
        if x.device != first.device:
            raise ValueError(f"{name}: expected the device of {first_name}, {first.device}, got {x.device}")
    for query, key in relations:
        for model, tensors in (("teacher", teacher), ("student", student)):
            width, other = tensors[query].shape[-1], tensors[key].shape[-1]
            if width != other:
                raise ValueError(
                    f"{model}_{key}: expected the head width of {model}_{query}, {width}, got {other}; both widths of "
                    "a relation must be equal (grouped-query models have fewer key heads, not narrower ones: cut the "
                    f"key into heads of width {width})"
                )
    for name, x in teacher.items():
        if x.requires_grad:
            raise ValueError(
                f"teacher_{name}: expected a tensor that does not require grad, got one that does; the teacher is not "
                "trained: run it under torch.no_grad() or pass teacher.detach()"
            )
    return tuple(first.shape[:-2]), first.device


def _check_sizes(name: str, x: Tensor, first_name: str, first: Tensor, relations: Sequence[tuple[str, str]]) -> None:
    """Checks a tensor that has not all of the first query's sizes: it may only be a key with fewer heads."""
    if x.shape[:-2] != first.shape[:-2]:
        raise ValueError(
            f"{name}: expected the batch and sequence sizes of {first_name}, {tuple(first.shape[:-2])}, got shape "
            f"{tuple(x.shape)}"
        )
    heads, own = first.shape[-2], x.shape[-2]
    queries, keys = ({pair[role] for pair in relations} for role in (0, 1))
    role = name.partition("_")[2]
    if role in queries and own != heads:
        raise ValueError(
            f"{name}: expected the {heads} heads of {first_name}, got {own}, shape {tuple(x.shape)}; only the key of a "
            "cross relation may have fewer. For the self relation of keys that have fewer heads, make a call with them "
            "alone"
        )
    if role in keys and heads % own:
        raise ValueError(
            f"{name}: expected the {heads} heads of {first_name}, or a number that divides them, got {own}, shape "
            f"{tuple(x.shape)}"
        )


def check_dense(name: str, x: object) -> None:
    """Raises TypeError unless x is a dense tensor: not nested, sparse, quantized, distributed or masked."""
    if type(x) is Tensor and x.layout is torch.strided and not x.is_nested and not x.is_quantized:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    found = conversion = None
    if x.is_nested:
        found = "a nested tensor"
        conversion = "its values() with cu_seqlens=offsets().int(), both of the layout torch.jagged"
    elif x.layout is not torch.strided:
        found, conversion = f"one of the layout {x.layout}", "its to_dense()"
    elif x.is_quantized:
        found, conversion = "a quantized one", "its dequantize()"
    elif type(x).__name__ == "DTensor":
        found, conversion = "a DTensor", "its to_local() where batch or heads are sharded, else its full_tensor()"
    elif type(x).__name__ == "MaskedTensor":
        found, conversion = "a MaskedTensor", "its get_data(), and the mask of tokens as attention_mask"
    if found:
        raise TypeError(f"{name}: expected a dense tensor, got {found}: pass {conversion}")


def _without_floats(*masks: Tensor | None) -> tuple[Any, ...]:
    """Returns the masks, float ones as bool, and a factor of the result, or None.

    The factor is NaN if a float mask that the host cannot read, and for which no error can be raised, has a value other
    than 0 and 1.
    """
    factor = None
    converted = []
    for mask in masks:
        if mask is not None and mask.is_floating_point():
            if not host_readable(mask):
                zero_or_one = ((mask == 0) | (mask == 1)).all()
                factor = torch.where(zero_or_one, 1.0 if factor is None else factor, torch.nan)
            mask = mask != 0
        converted.append(mask)
    return *converted, factor


def _check_mask_values(name: str, mask: Tensor) -> None:
    """Raises ValueError unless the mask is bool, floats of 0 and 1, or integers of 0 and one other value (−1 or more).

    The message has advice for additive masks, labels and segment numbers.
    """
    if mask.dtype == torch.bool or not mask.numel() or not host_readable(mask):
        return
    low, high = (x.item() for x in mask.aminmax())
    if not mask.is_floating_point() and low >= 0 and high <= 1:
        return
    nonzero = mask[mask != 0]
    if mask.is_floating_point() and bool((nonzero == 1).all()):
        return
    if not mask.is_floating_point() and low >= -1 and bool((nonzero == nonzero[0]).all()):
        return
    shown = f"numbers from {low} to {high}"
    meaning = "valid tokens" if name == "attention_mask" else "rows that count"
    if name == "query_mask" and low == -100:
        hint = ", like labels: pass labels != -100"
    elif low < 0:
        hint = f", like an additive mask: pass mask == 0, which is True on {meaning}"
    elif name == "query_mask":
        hint = ""
    elif bool((mask == mask.round()).all()):
        hint = ", like segment numbers: pack the segments and pass cu_seqlens"
    else:
        hint = ""
    expected = "floats of 0 and 1" if mask.is_floating_point() else "0 and one other number"
    raise ValueError(f"{name}: expected bool, or {expected}, nonzero on {meaning}, got {shown}{hint}")


def _check_masks(
    token_shape: tuple[int, ...],
    device: torch.device,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    causal: bool,
    prefix_lens: Tensor | None,
    query_mask: Tensor | None,
) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    masks = {
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "prefix_lens": prefix_lens,
        "query_mask": query_mask,
    }
    for name, mask in masks.items():
        if mask is None:
            continue
        check_dense(name, mask)
        floats = _FLOATS if name in ("attention_mask", "query_mask") else ()
        if mask.dtype not in _INTEGERS and mask.dtype not in floats:
            expected = "bool, integers, or floats of 0 and 1" if floats else "integers"
            raise TypeError(f"{name}: expected {expected}, got {mask.dtype}")
        if mask.device != device:
            raise ValueError(f"{name}: expected the device of the other tensors, {device}, got {mask.device}")
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask: expected None for packed inputs, whose tokens are all valid, got a tensor")
    for name, mask in (("attention_mask", attention_mask), ("query_mask", query_mask)):
        if mask is None:
            continue
        if tuple(mask.shape) != token_shape:
            letters = "(B, S)" if cu_seqlens is None else "(T,)"
            raise ValueError(f"{name}: expected shape {letters} = {token_shape}, got {tuple(mask.shape)}")
        _check_mask_values(name, mask)
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
                f"prefix_lens: expected one integer per sequence, shape ({sequences},), got {tuple(prefix_lens.shape)}"
            )


def _check_weight(weight: float) -> None:
    if torch.compiler.is_compiling():
        return
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(f"weights: expected numbers, got {type(weight).__name__}")
    if not math.isfinite(weight):
        raise ValueError(f"weights: expected finite numbers, got {weight}")


def _check_scale(name: str, scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        conversion = ""
        if isinstance(scale, Tensor):
            model = name.removesuffix("_scale")
            conversion = f": pass its .item(); to train it, multiply {model}_query by it and pass both keys"
        raise TypeError(f"{name}: expected a number or None, got {type(scale).__name__}{conversion}")
    if not math.isfinite(scale):
        raise ValueError(f"{name}: expected a finite number, got {scale}")
