"""Backend `triton`: the kernels of triton_kernels.py on every GPU that Triton serves, for sequences of any length.

All relations of one head width share a launch; a loss is one such group. The host is never waited for. On CPU tensors
the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 asks for it: a means of testing. See docs/triton.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import RelationInputs, grad_buffers
from minilm_kernels.relation.masks import marked

from .config import BASE_BLOCK, FUSION, INTERPRETED, INTERPRETED_LONG, LINK_BLOCK, blocks, in_parts, padded

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 128
_MOST_RELATIONS = 15  # of a launch: 4 bits of an int64 each
_LOG2_E = math.log2(math.e)


@cache
def unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU is present (with TRITON_INTERPRET=1 the kernels run on the CPU, very slowly, for tests)"
    return None


@cache
def interpreted() -> bool:
    """The kernels run in Triton's interpreter."""
    from triton import knobs

    return knobs.runtime.interpret


def unsupported_reasons(problem: RelationInputs) -> list[str]:
    reasons = []
    device = problem.mask.device.type
    tensors = (*problem.teacher, *problem.student)
    if device != ("cpu" if interpreted() else "cuda"):
        where = "in Triton's interpreter, on the CPU" if interpreted() else "on a GPU"
        reasons.append(f"it computes {where}, the tensors are on {problem.mask.device}")
    if others := {x.dtype for x in tensors} - set(_DTYPES):
        reasons.append(
            f"it computes in float32 for float32, float16 and bfloat16, not for {', '.join(map(str, others))}"
        )
    if interpreted() and any(x.dtype == torch.bfloat16 for x in tensors):
        reasons.append("Triton's interpreter multiplies bfloat16 matrices wrongly")
    if (widest := max(x.shape[-1] for x in tensors)) > _WIDEST:
        reasons.append(f"it serves head widths up to {_WIDEST}, got {widest}")
    return reasons


def forward_reduced(problem: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    call = _Call(problem)
    weights = marked(weights, call.fault)
    values: list[Tensor] = [weights] * len(problem.relations)  # all of them to be replaced
    grads = call.new_gradients() if gradient else {}
    for group in call.groups() if call.tiles else []:
        kl_rows = group.new_statistics()
        group.lse(kl_rows if gradient else None)
        if not gradient:
            group.rows(kl_rows, None)
        sums = group.link(kl_rows, gradient)
        if gradient:
            group.gradients(weights.contiguous(), False, grads)
        for value, r in zip(sums, group.relations, strict=True):
            values[r] = value
    if not call.tiles:
        return marked(call.new((len(values),)).zero_(), call.fault), list(grads.values())
    return (torch.stack(values).sum(-1) * weights).sum(-1).clamp_(min=0.0), list(grads.values())


def forward_none(problem: RelationInputs) -> Tensor:
    call = _Call(problem)
    *batch, positions = problem.mask.token_shape
    out = call.new((len(problem.relations), *batch, problem.heads, positions), covered=True)
    for group in call.groups() if call.tiles else []:
        group.lse(None)
        group.rows(None, tuple(out[r] for r in group.relations))
    return marked(out, call.fault)


def backward_none(problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    call = _Call(problem)
    row_grads = marked(row_grads.float(), call.fault).contiguous()
    grads = call.new_gradients()
    for group in call.groups() if call.tiles else []:
        weights = group.new_statistics()
        group.lse(None)
        group.link(None, True, tuple(row_grads[r] for r in group.relations), weights)
        group.gradients(weights, True, grads)
    return list(grads.values())


@dataclass
class _Call:
    """One problem as the kernels see it: how its sequences lie, and what its groups share."""

    problem: RelationInputs  # with its mask repaired
    fault: Tensor | None = field(init=False)  # see Mask.repaired
    sequences: int = field(init=False)
    positions: int = field(init=False)  # of a sequence; packed: T
    total: int = field(init=False)  # B·S or T
    tiles: bool = field(init=False)  # there is something to do
    masks: dict[str, Any] = field(init=False)  # arguments of the kernels
    modes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        from . import kernels

        mask, self.fault = self.problem.mask.repaired()
        self.problem = replace(self.problem, mask=mask)
        self.sequences = mask.num_sequences
        self.positions = mask.token_shape[-1]
        self.total = math.prod(mask.token_shape)
        self.tiles = self.total > 0 and self.sequences > 0
        tokens, starts, prefixes = None, mask.cu_seqlens, mask.prefix_lens
        if mask.attention_mask is not None:
            tokens, starts, prefixes = mask.unpad()
        self.masks = {
            "tokens": tokens,
            "starts": starts if starts is None else starts.contiguous(),
            "prefixes": prefixes if prefixes is None else prefixes.long().contiguous(),
        }
        order = kernels.BIDIRECTIONAL if mask.bidirectional else kernels.CAUSAL if prefixes is None else kernels.PREFIX
        self.modes = {"PACKED": mask.packed, "LIST": tokens is not None, "MASK": order.value}

    def new(self, shape: tuple[int, ...], covered: bool = False) -> Tensor:
        """float32. `covered`: the kernels write every real token's part, other tokens keep zeros."""
        empty = covered and (not self.tiles or self.problem.mask.attention_mask is not None)
        return (torch.zeros if empty else torch.empty)(shape, dtype=torch.float32, device=self.problem.mask.device)

    def new_gradients(self) -> dict[tuple[int, int], Tensor]:
        slots = grad_buffers(self.problem.relations)
        return {(r, m): self.new(tuple(self.problem.student[m].shape), covered=True) for r, m in slots}

    def groups(self) -> Iterator[_Group]:
        """Relations of one kind, width and scale, as many as a launch takes."""
        members: dict[tuple, list[int]] = {}
        for r, (query, key) in enumerate(self.problem.relations):
            widths = tuple(side[query].shape[-1] for side in (self.problem.teacher, self.problem.student))
            members.setdefault((query == key, widths), []).append(r)
        for (self_relation, _), relations in members.items():
            for first in range(0, len(relations), _MOST_RELATIONS):
                yield _Group(self, relations[first : first + _MOST_RELATIONS], self_relation)

    def tile_map(self, block: int) -> tuple[int, Tensor | None]:
        """How many tiles of `block` own tokens the grid has a head and, packed, the sequence of each."""
        cu_seqlens = self.problem.mask.cu_seqlens
        if cu_seqlens is None:
            return -(-self.positions // block), None
        sequences = tile_map(cu_seqlens, self.total, block)
        return sequences.numel(), sequences


class _Group:
    """The relations of one launch."""

    def __init__(self, call: _Call, relations: list[int], self_relation: bool) -> None:
        self.call, self.relations, self.self_relation = call, relations, self_relation
        problem = call.problem
        pairs = [problem.relations[r] for r in relations]
        used = sorted({m for pair in pairs for m in pair})
        self.scale_t, self.scale_s = problem.scales(pairs[0])
        self.teacher, strides_t, align_t = _side([problem.teacher[m] for m in used])
        self.student, strides_s, align_s = _side([problem.student[m] for m in used])
        self.inputs: dict[str, Any] = {
            "teacher": self.teacher,
            "teacher_strides": strides_t,
            "student": self.student,
            "student_strides": strides_s,
            "scale_t": self.scale_t * _LOG2_E,
            "scale_s": self.scale_s * _LOG2_E,
            "D_T": self.teacher[0].shape[-1],
            "D_S": self.student[0].shape[-1],
            "DP_T": padded(self.teacher[0].shape[-1]),
            "DP_S": padded(self.student[0].shape[-1]),
            "ALIGN_T": align_t,
            "ALIGN_S": align_s,
            "PRECISION": "ieee",
        }
        # Packed sequences have their statistics side by side, the others each from a multiple of 16 on.
        self.span16 = -(-call.positions // 16)
        self.rows16 = self.span16 if call.problem.mask.packed else call.sequences * self.span16
        self.sizes = {
            "queries": _codes([used.index(query) for query, _ in pairs]),
            "keys": _codes([used.index(key) for _, key in pairs]),
            "heads": problem.heads,
            "sequences": call.sequences,
            "positions": call.positions,
            "total": call.total,
            "rows16": self.rows16,
            "span16": self.span16,
        }

        self.sums = {name: self.new_statistics() for name in ("sum_t", "sum_s")}
        self.bases = {name: self.new_statistics() for name in ("base_t", "base_s")}
        self.links = call.new((len(relations), call.sequences, problem.heads, 4))

    def new_statistics(self) -> Tensor:
        return self.call.new((len(self.relations), self.call.problem.heads, self.rows16 * 16))

    def lse(self, kl_rows: Tensor | None) -> None:
        from .kernels import base_kernel

        if self.self_relation:
            self._launch_heads(base_kernel, BASE_BLOCK, **self.inputs)
        self._launch(
            "lse",
            links=self.links,
            **self.sums,
            **self.bases,
            kl_rows=kl_rows,
            SELF_RELATION=self.self_relation,
            VALUE=kl_rows is not None,
        )

    def rows(self, kl_rows: Tensor | None, out: tuple[Tensor, ...] | None) -> None:
        self._launch("rows", **self.sums, **self.bases, kl_rows=kl_rows, out=out, RESULT=out is not None)

    def link(
        self,
        kl_rows: Tensor | None,
        gradient: bool,
        row_grads: tuple[Tensor, ...] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """(R, N, A) sums of the rows' KL; leaves the sums and `links` as the gradient kernel takes them."""
        from .kernels import link_kernel

        values = torch.empty_like(self.links[..., 0])
        self._launch_heads(
            link_kernel,
            LINK_BLOCK,
            **self.sums,
            **self.bases,
            kl_rows=kl_rows,
            values=values,
            row_grads=row_grads,
            weights=weights,
            SELF_RELATION=self.self_relation,
            VALUE=kl_rows is not None,
            GRADIENT=gradient,
            ROWS=row_grads is not None,
            SHIFT=self._shift,
        )
        return values

    def gradients(self, weights: Tensor, row_weights: bool, grads: dict[tuple[int, int], Tensor]) -> None:
        from .kernels import KEY, QUERY, SELF

        for role in (SELF,) if self.self_relation else (QUERY, KEY):
            ends = (self.call.problem.relations[r][role.value == KEY.value] for r in self.relations)
            self._launch(
                "gradient",
                **self.sums,
                **self.bases,
                links=self.links,
                weights=weights,
                out=tuple(grads[r, m] for r, m in zip(self.relations, ends, strict=True)),
                ROLE=role.value,
                ROWS=row_weights,
                gradient_scale=self.scale_s * 2.0**-self._shift,
            )

    @property
    def _shift(self) -> float:
        """Bits that keep the gradient's float16 operands, of size 1 / L but at most 2, within float16's range."""
        return 14.0 if self.student[0].dtype == torch.float16 else 0.0

    def _launch_heads(self, kernel: Any, block: int, **arguments: Any) -> None:
        """A kernel of which one program serves a head of a sequence in a relation, `block` rows at a time."""
        self._start(kernel, self.links[..., 0].numel(), arguments | {"links": self.links, "BLOCK": block} | FUSION)

    def _launch(self, name: str, **arguments: Any) -> None:
        """A kernel of which one program owns a tile of rows."""
        from . import kernels as triton_kernels

        kernel = {
            "lse": triton_kernels.lse_kernel,
            "rows": triton_kernels.rows_kernel,
            "gradient": triton_kernels.gradient_kernel,
        }[name]
        itemsize_t, itemsize_s = self.teacher[0].itemsize, self.student[0].itemsize
        if interpreted():
            chosen = INTERPRETED if self.call.positions <= 300 or self.call.modes["PACKED"] else INTERPRETED_LONG
        else:
            modes = self.call.modes
            crowded = modes["LIST"] and modes["MASK"] == triton_kernels.PREFIX.value
            width = max(self.inputs["DP_T"], self.inputs["DP_S"])
            chosen = blocks(name, width, max(itemsize_t, itemsize_s), crowded)
        tiles, tile_map = self.call.tile_map(chosen.block_m)
        sequences = 1 if tile_map is not None else self.call.sequences
        arguments |= {
            **self.inputs,
            "PARTS_T": in_parts(self.inputs["DP_T"], itemsize_t),
            "PARTS_S": in_parts(self.inputs["DP_S"], itemsize_s),
            "tiles": tiles,
            "tile_map": tile_map,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
            **FUSION,
        }
        self._start(kernel, self.call.problem.heads * tiles * sequences * len(self.relations), arguments)

    def _start(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        """Passes on what of the arguments, and of those that all kernels share, the kernel has."""
        given = {**self.sizes, **self.call.masks, **self.call.modes, **arguments}
        names = {*kernel.arg_names, "num_warps", "num_stages", *FUSION}
        with _device(self.links):
            kernel[(programs,)](**{name: value for name, value in given.items() if name in names})


def tile_map(cu_seqlens: Tensor, total: int, block: int) -> Tensor:
    """The sequence of each tile of `block` tokens, as many tiles as `total` tokens can fill: the host waits for none.

    A sequence that starts at token c has its tiles from c // block + its number on: no two share one, there are enough
    for any lengths, and nothing has to be summed up.
    """
    sequences = cu_seqlens.numel() - 1
    ends = cu_seqlens[1:] // block + torch.arange(1, sequences + 1, device=cu_seqlens.device)
    tiles = torch.arange(total // block + sequences, device=cu_seqlens.device)
    return torch.searchsorted(ends, tiles, right=True).clamp_(max=sequences - 1)


def _side(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """Tensors of one dtype, features side by side; strides of batches, tokens and heads, and the strides' unit."""
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    aligned = tuple(x.to(dtype) if x.stride(-1) == 1 or x.shape[-1] == 1 else x.to(dtype).contiguous() for x in tensors)
    strides = [s for x in aligned for s in ((0,) * (4 - x.dim()) + x.stride())[:3]]
    unit = math.gcd(16 // dtype.itemsize, *strides)
    return aligned, tuple(s // unit for s in strides), unit


def _codes(indices: list[int]) -> int:
    return sum(index << 4 * k for k, index in enumerate(indices))


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
