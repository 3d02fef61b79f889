"""Backend `cuda`: the CUDA C++ kernels of csrc/cuda.

The package brings the host code as a library, which needs no CUDA to be built or loaded, and the kernels as sources;
`cuda_compiler` compiles them for the shape of a call when that is first made. The library registers private operators
through PyTorch's stable ABI; here a problem becomes their arguments. Nothing here waits for the device, and a
call whose kernels are loaded can be captured in a CUDA graph. See docs/cuda.md.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import BackendUnavailable, RelationInputs, grad_buffers
from minilm_kernels.relation.masks import add_fault

from . import cuda_compiler
from .cuda_cache import KernelCache

_LIBRARY = Path(__file__).parents[2] / "_cuda.abi3.so"
_MISSING = _LIBRARY.with_name("_cuda.missing")  # left by setup.py: why it could not build the library
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_DEVICE = "cuda"
_operators = torch.ops.minilm_kernels_cuda  # tests put those of the emulated library in its place

MOST_KERNELS = 256  # that a process loads: one of ever changing shapes does not compile for ever
_loading = threading.Lock()
_loaded: set[tuple[int, str]] = set()  # device, kernel
_broken: str | None = None  # why kernels could not be compiled or loaded


@cache
def _missing() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if not _LIBRARY.exists():
        reason = "the package was installed without its CUDA library"
        return f"{reason}: {_MISSING.read_text(encoding='utf-8')}" if _MISSING.exists() else reason
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"its library does not load: {error}"
    return cuda_compiler.unavailable_reason()


def unavailable_reason() -> str | None:
    return _broken or _missing()


def unsupported_reasons(problem: RelationInputs) -> list[str]:
    reasons = []
    others = {x.dtype for x in (*problem.teacher, *problem.student)} - set(_DTYPES)
    if others:
        reasons.append(
            f"it computes in float32 for float32, float16 and bfloat16, not for {', '.join(map(str, others))}"
        )
    if problem.mask.device.type != _DEVICE:
        reasons.append(f"it computes on {_DEVICE} devices, the tensors are on {problem.mask.device}")
    elif not others:
        device, _ = _place(problem.mask.device)
        try:
            reason = _operators.refusal(problem.teacher, problem.student, _pairs(problem), device)
        except RuntimeError as error:  # of the driver library
            reason = str(error)
        reasons += [reason] if reason else []
    return reasons


def forward_reduced(problem: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    problem, fault = _repaired(problem)
    values = weights.new_empty(len(problem.relations))
    grads = _new_gradients(problem) if gradient else []
    _run(problem, weights=add_fault(weights, fault).contiguous(), values=values, grads=grads)
    return add_fault(values, fault), grads


def forward_none(problem: RelationInputs) -> Tensor:
    problem, fault = _repaired(problem)
    *batch, positions = problem.mask.token_shape
    shape = (len(problem.relations), *batch, problem.heads, positions)
    new = torch.zeros if _padded(problem) else torch.empty
    out = new(shape, dtype=torch.float32, device=problem.mask.device)
    _run(problem, rows=out)
    return add_fault(out, fault)


def backward_none(problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    problem, fault = _repaired(problem)
    grads = _new_gradients(problem)
    _run(problem, row_grads=add_fault(row_grads.float(), fault).contiguous(), grads=grads)
    return grads


def _repaired(problem: RelationInputs) -> tuple[RelationInputs, Tensor | None]:
    mask, fault = problem.mask.sanitize_bounds()
    return replace(problem, mask=mask), fault


def _new_gradients(problem: RelationInputs) -> list[Tensor]:
    """One of every slot. Tokens that are not real are not written: theirs are zeros."""
    new = torch.zeros if _padded(problem) else torch.empty
    return [
        new(problem.student[m].shape, dtype=torch.float32, device=problem.mask.device)
        for _, m in grad_buffers(problem.relations)
    ]


def _padded(problem: RelationInputs) -> bool:
    """Whether a token may not be real; a repaired packing covers all of them."""
    return problem.mask.attention_mask is not None


def _pairs(problem: RelationInputs) -> list[int]:
    return [m for relation in problem.relations for m in relation]


def _place(device: torch.device) -> tuple[int, int]:
    """The number of a device, and its current stream."""
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


def _run(
    problem: RelationInputs,
    weights: Tensor | None = None,
    row_grads: Tensor | None = None,
    values: Tensor | None = None,
    rows: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> None:
    mask = problem.mask
    tokens, starts, prefixes = mask.unpad()
    longest = mask.token_shape[-1] if mask.max_seqlen is None else mask.max_seqlen
    device, stream = _place(mask.device)
    arguments = (
        problem.teacher,
        problem.student,
        _pairs(problem),
        [scale for relation in problem.relations for scale in problem.scales(relation)],
        tokens,
        starts,
        prefixes,
        not mask.bidirectional,
        _padded(problem),
        longest,
        weights,
        row_grads,
        values,
        rows,
        grads or [],
        stream,
        device,
    )
    if missing := _operators.relation_kl(*arguments):
        _load(missing.split("\n"), device)
        _operators.relation_kl(*arguments)


@cache
def _cache() -> KernelCache:
    return KernelCache()


def _load(names: list[str], device: int) -> None:
    """Compiles and loads kernels on a device. Raises `BackendUnavailable`."""
    global _broken
    with _loading:
        names = [name for name in names if (device, name) not in _loaded]
        if not names:  # another thread was faster
            return
        if len(_loaded) + len(names) > MOST_KERNELS:
            raise BackendUnavailable(
                f"this process has compiled kernels for many shapes; more than {MOST_KERNELS} kernels it does not load"
            )
        try:
            code = cuda_compiler.compile_kernels(names, _operators.capability(device), cache=_cache())
            for name in names:
                _operators.load(name, torch.frombuffer(bytearray(code[name]), dtype=torch.uint8), device)
        except (cuda_compiler.CompilerError, RuntimeError) as error:
            _broken = str(error)
            raise BackendUnavailable(_broken) from error
        _loaded.update((device, name) for name in names)
