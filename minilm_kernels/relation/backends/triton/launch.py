"""Backend `triton`: runs on every GPU that Triton supports, for sequences of any length and head widths up to 128.

Relations of equal kind (self or cross), width and scale share each launch. The host never waits for the GPU. With
TRITON_INTERPRET=1 the kernels run on CPU tensors in Triton's interpreter, for tests. See docs/triton.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minilm_kernels._choices import Reduction
from minilm_kernels.relation.inputs import RelationInputs, Scaling, grad_buffers

from .config import (
    CLEARING_PROGRAMS,
    FINALIZE_BLOCK,
    FULL_GPU,
    FUSION,
    PIVOT_BLOCK,
    SCALE_BLOCK,
    SEQUENCE_BLOCK,
    TOTAL_BLOCK,
    LaunchConfig,
    diagonal_stages,
    float32_precision,
    padded_width,
    sliced,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_WIDTH = 128
_MAX_UNORDERED_ITEMSIZE = 2  # float32 products take too many registers; tests in the interpreter allow 4
_MAX_RELATIONS = 12  # relations of a launch: an int64 holds 5 bits for each, the index of one of up to 24 tensors
_LOG2_E = math.log2(math.e)


@cache
def unavailable_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "no GPU is present (for tests, TRITON_INTERPRET=1 runs the kernels on the CPU, very slowly)"
    return None


@cache
def interpreted() -> bool:
    """Returns whether the kernels run in Triton's interpreter."""
    from triton import knobs

    return knobs.runtime.interpret


def unsupported_reasons(inputs: RelationInputs) -> list[str]:
    reasons = []
    device = inputs.mask.device.type
    tensors = (*inputs.teacher, *inputs.student)
    if device != ("cpu" if interpreted() else "cuda"):
        expected = "CPU tensors, in Triton's interpreter" if interpreted() else "GPU tensors"
        reasons.append(f"it supports {expected}, but the tensors are on {inputs.mask.device}")
    if others := {x.dtype for x in tensors} - set(_DTYPES):
        reasons.append(f"it supports float32, float16 and bfloat16, got {', '.join(map(str, others))}")
    if interpreted() and any(x.dtype == torch.bfloat16 for x in tensors):
        reasons.append("Triton's interpreter multiplies bfloat16 matrices incorrectly")
    if (widest := max(x.shape[-1] for x in tensors)) > _MAX_WIDTH:
        reasons.append(f"it supports head widths up to {_MAX_WIDTH}, got {widest}")
    return reasons


def forward_reduced(inputs: RelationInputs, reduction: Reduction, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    call = _Call(inputs, reduction)
    grads = call.new_gradients() if gradient else {}
    call.prepare(grads)
    shape = (len(inputs.relations),) if inputs.weights is None else ()
    losses = call.new(shape, zeros=not call.has_tiles)
    for number, group in enumerate(call.groups() if call.has_tiles else []):
        if gradient and group.has_unordered_kernel():
            values = group.unordered(grads)
        else:
            kl_rows = group.new_row_stats()
            group.row_stats(kl_rows if gradient else None)
            if not gradient:
                group.row_kl(kl_rows, None)
            values = group.finalize(kl_rows, gradient)
            if gradient:
                group.gradients(None, grads)
        group.total(values, losses, add=number > 0)
    return losses if call.has_tiles else call.with_fault(losses), list(grads.values())


def forward_none(inputs: RelationInputs) -> Tensor:
    call = _Call(inputs)
    call.prepare({})
    *batch, positions = inputs.mask.token_shape
    out = call.new((len(inputs.relations), *batch, inputs.heads, positions), covered=True)
    for group in call.groups() if call.has_tiles else []:
        group.row_stats(None)
        group.row_kl(None, out)
    return call.with_fault(out)


def backward_none(inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    call = _Call(inputs)
    grads = call.new_gradients()
    call.prepare(grads)
    row_grads = call.with_fault(row_grads.float()).contiguous()
    for group in call.groups() if call.has_tiles else []:
        weights = group.new_row_stats()
        group.row_stats(None)
        group.finalize(None, True, row_grads, weights)
        group.gradients(weights, grads)
    return list(grads.values())


def scale(scaling: Scaling) -> list[Tensor] | None:
    """See `Backend`."""
    results = scaling.results("cpu" if interpreted() else "cuda")
    if results is None:
        return None
    from .scale import scale_kernel

    blocks = list(accumulate(-(-x.numel() // SCALE_BLOCK) for x in results))
    counts = [scaling.owners.count(m) for m in range(len(results))]
    upstream = scaling.upstream
    if upstream.dim() and upstream.stride(0) > 1:
        upstream = upstream.contiguous()
    arguments = {
        "out": tuple(results),
        "parts": tuple(scaling.parts),
        "upstream": upstream,
        "relations": encode_integers(scaling.relations),
        "weights": tuple(float(weight) for weight in scaling.weights),
        "sizes": encode_integers(x.numel() for x in results),
        "blocks": encode_integers(blocks),
        "FIRSTS": tuple(accumulate(counts[:-1], initial=0)),
        "COUNTS": tuple(counts),
        "STRIDE": upstream.stride(0) if upstream.dim() else 0,
        "BLOCK": SCALE_BLOCK,
    }
    if blocks[-1]:
        _start(upstream.device, scale_kernel, (blocks[-1],), arguments, FUSION)
    return results


@dataclass
class _Call:
    """The inputs of one call in the form that the kernels take, and the arguments that all groups share."""

    inputs: RelationInputs
    reduction: Reduction = "sum"
    sequences: int = field(init=False)
    positions: int = field(init=False)  # positions of a sequence; T for packed inputs
    total: int = field(init=False)  # B * S or T
    has_tiles: bool = field(init=False)  # False if there are no tokens; then nothing is launched
    mask_arguments: dict[str, Any] = field(init=False)
    mask_constants: dict[str, Any] = field(init=False)
    weights: Tensor | None = field(init=False)  # weights of the sequences' rows
    weight: float = field(init=False)  # weight of all rows, in calls without `weights`
    tile_maps: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from .primitives import BIDIRECTIONAL, CAUSAL, PREFIX

        mask = self.inputs.mask
        self.sequences = mask.num_sequences
        self.positions = mask.token_shape[-1]
        self.total = math.prod(mask.token_shape)
        self.has_tiles = self.total > 0 and self.sequences > 0
        padded, rows = mask.attention_mask is not None, mask.query_mask is not None
        starts = (self.sequences + 1, torch.int32) if mask.packed else (self.sequences, torch.int64)
        prefixes = mask.prefix_integers()
        if padded and prefixes is not None:
            prefixes = torch.empty(self.sequences, dtype=torch.int64, device=mask.device)
        self.mask_arguments = {
            "indices": self._new_integers(self.total, torch.int64) if padded else None,
            "starts": self._new_integers(*starts) if padded or mask.packed else None,
            "prefixes": prefixes,
            "counted": self._new_integers(self.total, torch.bool) if rows else None,
        }
        has_weights = mask.packed or ((padded or rows) and self.reduction != "sum")
        self.weights = self.new((self.sequences,)) if has_weights and self.sequences else None
        self.weight = 1.0
        if self.weights is None and self.reduction != "sum":
            self.weight = 1 / max(1, self.inputs.heads * self.total)
        kind = BIDIRECTIONAL if mask.bidirectional else CAUSAL if prefixes is None else PREFIX
        self.mask_constants = {
            "PACKED": mask.packed,
            "HAS_INDICES": padded,
            "HAS_QUERY_MASK": mask.query_mask is not None,
            "MASK": kind.value,
        }

    def _new_integers(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.inputs.mask.device)

    def prepare(self, grads: Mapping[tuple[int, int], Tensor]) -> None:
        """Fills the arrays that depend on the masks, and clears the gradients of padding."""
        from .sequences import sequences_kernel, weights_kernel

        mask, arrays = self.inputs.mask, self.mask_arguments
        if self.sequences == 0:
            return
        bounds = mask.cu_seqlens if mask.cu_seqlens is None else mask.cu_seqlens.contiguous()
        max_seqlen = -1 if mask.max_seqlen is None else mask.max_seqlen
        row_counts = None
        if mask.attention_mask is not None or mask.query_mask is not None:
            row_counts = self._new_integers(self.sequences, torch.int64)
            padded = mask.attention_mask is not None
            cleared = tuple(grads.values()) if padded and self.total else ()
            strides = [((0, 0) if x is None else (0, *x.stride())[-2:]) for x in (mask.attention_mask, mask.query_mask)]
            arguments = {
                "attention_mask": mask.attention_mask,
                "attention_batch_stride": strides[0][0],
                "attention_stride": strides[0][1],
                "query_mask": mask.query_mask,
                "query_batch_stride": strides[1][0],
                "query_stride": strides[1][1],
                "cu_seqlens": bounds,
                "prefix_lens": mask.prefix_integers() if padded else None,
                "sequences": self.sequences,
                "positions": self.positions,
                "max_seqlen": max_seqlen,
                "indices": arrays["indices"],
                "lengths": arrays["starts"] if padded else None,
                "row_counts": row_counts,
                "prefixes": arrays["prefixes"] if padded else None,
                "counted": arrays["counted"],
                "out": cleared or None,
                "columns": encode_integers(x.numel() // self.total for x in cleared) or None,
                "BLOCK": SEQUENCE_BLOCK,
                "ROWS": 16,
                "COLUMNS": 64,
            }
            grid = (self.sequences, CLEARING_PROGRAMS if cleared else 1)
            _start(mask.device, sequences_kernel, grid, arguments, FUSION)
        if self.weights is not None:
            arguments = {
                "cu_seqlens": bounds,
                "row_counts": row_counts,
                "sequences": self.sequences,
                "positions": self.positions,
                "max_seqlen": max_seqlen,
                "heads": float(self.inputs.heads),
                "bounds": arrays["starts"] if mask.packed else None,
                "weights": self.weights,
                "REDUCTION": self.reduction,
                "BLOCK": SEQUENCE_BLOCK,
            }
            _start(mask.device, weights_kernel, (1,), arguments, FUSION)

    def with_fault(self, x: Tensor) -> Tensor:
        """Returns x, or NaN if `cu_seqlens` is malformed. The weights of a call with reduction "sum" are 1 or NaN."""
        if not self.inputs.mask.packed or self.weights is None:
            return x
        return x + 0 * self.weights[0]

    def new(self, shape: tuple[int, ...], covered: bool = False, zeros: bool = False) -> Tensor:
        """Allocates float32. `covered`: the kernels write the entries of valid tokens only, so all others must be 0."""
        zeros |= covered and (not self.has_tiles or self.inputs.mask.attention_mask is not None)
        return (torch.zeros if zeros else torch.empty)(shape, dtype=torch.float32, device=self.inputs.mask.device)

    def new_gradients(self) -> dict[tuple[int, int], Tensor]:
        buffers = grad_buffers(self.inputs.relations)
        return {(r, m): self.new(tuple(self.inputs.student[m].shape), zeros=not self.has_tiles) for r, m in buffers}

    def groups(self) -> Iterator[_Group]:
        """Yields groups of relations of equal kind, width, scale and key groups, at most `_MAX_RELATIONS` in each."""
        members: dict[tuple[bool, tuple[int, ...], tuple[int, int]], list[int]] = {}
        for r, (query, key) in enumerate(self.inputs.relations):
            widths = tuple(model[query].shape[-1] for model in (self.inputs.teacher, self.inputs.student))
            members.setdefault((query == key, widths, self.inputs.key_groups((query, key))), []).append(r)
        for (self_relation, *_), relations in members.items():
            for first in range(0, len(relations), _MAX_RELATIONS):
                yield _Group(self, relations[first : first + _MAX_RELATIONS], self_relation)

    def operand(self, x: Tensor, clear: bool) -> Tensor:
        """Returns x, or with `clear` a copy that is 0 on rows that do not count."""
        counted = self.mask_arguments["counted"]
        return x.masked_fill(~counted.view(x.shape[:-2])[..., None, None], 0) if clear else x

    def tile_grid(self, block: int) -> tuple[int, Tensor | None]:
        """Returns the number of tiles of `block` tokens per head and, for packed inputs, the sequence of each tile."""
        if not self.inputs.mask.packed:
            return -(-self.positions // block), None
        if block not in self.tile_maps:
            self.tile_maps[block] = tile_map(self.mask_arguments["starts"], self.total, block)
        return self.tile_maps[block].numel(), self.tile_maps[block]


class _Group:
    """The relations of one launch, their operands and their statistics."""

    def __init__(self, call: _Call, relations: list[int], self_relation: bool) -> None:
        self.call, self.relations, self.self_relation = call, relations, self_relation
        inputs = call.inputs
        pairs = [inputs.relations[r] for r in relations]
        # Queries of rows that do not count are set to 0, unless they are keys, too: NaN in them must not matter.
        cleared = inputs.mask.query_mask is not None and not self_relation
        queries, keys = ([(m, cleared) for m, _ in pairs], [(m, False) for _, m in pairs])
        used = sorted({*queries, *keys})
        self.scale_t, self.scale_s = inputs.scales(pairs[0])
        self.group_t, self.group_s = inputs.key_groups(pairs[0])
        self.teacher, strides_t, align_t = _aligned([call.operand(inputs.teacher[m], clear) for m, clear in used])
        self.student, strides_s, align_s = _aligned([call.operand(inputs.student[m], clear) for m, clear in used])
        padded = [padded_width(x.shape[-1]) for x in (self.teacher[0], self.student[0])]
        self.operands: dict[str, Any] = {
            "teacher": self.teacher,
            "teacher_strides": strides_t,
            "student": self.student,
            "student_strides": strides_s,
            "scale_t": self.scale_t * _LOG2_E,
            "scale_s": self.scale_s * _LOG2_E,
            "D_T": self.teacher[0].shape[-1],
            "D_S": self.student[0].shape[-1],
            "DP_T": padded[0],
            "DP_S": padded[1],
            "ALIGN_T": align_t,
            "ALIGN_S": align_s,
            "GROUP_T": self.group_t,
            "GROUP_S": self.group_s,
            "PRECISION": float32_precision(max(padded), _capability(inputs.mask.device)),
        }
        # Rows of packed sequences are adjacent; each dense sequence begins at a multiple of 16 rows.
        seq_stride16 = -(-call.positions // 16)
        self.head_stride16 = seq_stride16 if inputs.mask.packed else call.sequences * seq_stride16
        self.sizes: dict[str, Any] = {
            "relations": encode_integers(relations),
            "query_codes": _encode([used.index(query) for query in queries]),
            "key_codes": _encode([used.index(key) for key in keys]),
            "heads": inputs.heads,
            "sequences": call.sequences,
            "positions": call.positions,
            "total": call.total,
            "stats_head_stride16": self.head_stride16,
            "stats_seq_stride16": seq_stride16,
        }

    @cached_property
    def stats(self) -> dict[str, Tensor]:
        return {name: self.new_row_stats() for name in ("sum_t", "sum_s", "pivot_t", "pivot_s")}

    @cached_property
    def head_stats(self) -> Tensor:
        """(R, N, A, 4): teacher's pivot, student's pivot, 1 if they are shared, largest row weight."""
        return self.call.new((len(self.relations), self.call.sequences, self.call.inputs.heads, 4))

    @property
    def programs(self) -> int:
        """Number of programs in a grid with one for each head of a sequence in a relation."""
        return len(self.relations) * self.call.sequences * self.call.inputs.heads

    def new_row_stats(self, copies: int = 0, numbers: int = 1) -> Tensor:
        """Allocates `numbers` float32 per row, (R, A, rows * numbers), and in front of R, `copies` more that are 0."""
        shape = (len(self.relations), self.call.inputs.heads, self.head_stride16 * 16 * numbers)
        return self.call.new((1 + copies, *shape), zeros=True) if copies else self.call.new(shape)

    def has_unordered_kernel(self) -> bool:
        """Returns whether the kernel of unordered pairs serves the group's reduced losses with gradient."""
        call, d_s = self.call, self.operands["D_S"]
        if not self.self_relation or min(self.scale_t, self.scale_s) <= 0:
            return False
        if max(self.operands["DP_T"], self.operands["DP_S"]) > 16 or call.positions * call.inputs.heads * d_s >= 2**31:
            return False
        return max(self.teacher[0].itemsize, self.student[0].itemsize) <= _MAX_UNORDERED_ITEMSIZE

    def unordered(self, grads: dict[tuple[int, int], Tensor]) -> Tensor:
        """Fills the gradient buffers of the group's relations. Returns sums of the rows' KL, (R, N, A, parts)."""
        from .unordered import unordered_kernel

        call = self.call
        mask = call.inputs.mask
        longest = mask.max_seqlen if mask.max_seqlen is not None else call.total // call.sequences
        processors, arch = _gpu(mask.device)
        config = (
            LaunchConfig.for_interpreter(longest, False)
            if interpreted()
            else LaunchConfig.unordered((self.operands["D_T"], self.operands["D_S"]), longest, mask.bidirectional, arch)
        )
        # If there are few heads, several programs share each of them, at most one for each strip.
        wanted = FULL_GPU * processors // (self.programs * config.num_warps)
        parts = max(1, min(wanted, -(-longest // config.block_m)))
        copies = parts if parts > 1 else 0
        filled = [grads[r, call.inputs.relations[r][0]] for r in self.relations]
        out = [call.new((1 + copies, *x.shape), zeros=True) for x in filled] if copies else filled
        values = call.new((len(self.relations), call.sequences, call.inputs.heads, parts))
        sum_stages, stages = diagonal_stages(arch)
        arguments = {
            **self.operands,
            "sums": self.new_row_stats(copies, numbers=2),
            "pivots": self.new_row_stats(numbers=2),
            "copies": copies,
            "weights": call.weights,
            "values": values,
            "out": tuple(out),
            "gradient_scale": self.scale_s * 2.0**-self._shift * call.weight,
            "DG": 8 if self.operands["D_S"] <= 8 else 16,
            "SHIFT": self._shift,
            "SPLIT": copies > 0,
            "WARPS": config.num_warps,
            "SUM_STAGES": sum_stages,
            "STAGES": stages,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        phases = ("SUMS", "INVERSES", "GRADIENT")
        for launched in [(phase,) for phase in phases] if copies else [phases]:
            grid = (self.programs, 1 if launched == ("INVERSES",) else parts)
            flags = {phase: phase in launched for phase in phases}
            self._start(unordered_kernel, grid, arguments | flags, config.options)
        for total, copied in zip(filled, out, strict=True) if copies else []:
            torch.sum(copied, 0, out=total)
        return values

    def total(self, values: Tensor, losses: Tensor, add: bool) -> None:
        """Writes the losses of the group's relations: `values` (R, N, A, ...) times the sequences' weights.

        In calls whose relations have weights, writes the sum of the losses or, with `add`, adds it to that of others.
        """
        from .unordered import total_kernel

        columns = values[0, 0].numel()
        call, weights = self.call, self.call.inputs.weights
        arguments = {
            "values": values,
            "weights": call.weights,
            "losses": losses,
            "columns": columns,
            "weight": call.weight,
            "relation_weights": None if weights is None else tuple(float(weights[r]) for r in self.relations),
            "ADD": add and weights is not None,
            "BLOCK": TOTAL_BLOCK,
        }
        self._start(total_kernel, (len(self.relations) if weights is None else 1,), arguments, FUSION)

    def row_stats(self, kl_rows: Tensor | None) -> None:
        """Computes the statistics of all rows. If `kl_rows` is given, writes the rows' KL in its training form."""
        from .row_stats import pivot_kernel, row_stats_kernel

        if self.self_relation:
            self._launch_heads(pivot_kernel, PIVOT_BLOCK, **self.operands)
        self._launch_tiles(
            row_stats_kernel,
            "row_stats",
            head_stats=self.head_stats,
            kl_rows=kl_rows,
            SELF_RELATION=self.self_relation,
            COMPUTE_KL=kl_rows is not None,
        )

    def row_kl(self, kl_rows: Tensor | None, out: Tensor | None) -> None:
        """Writes the exact KL of every row to `out`, which has the rows of all relations, or to `kl_rows`."""
        from .row_kl import row_kl_kernel

        self._launch_tiles(row_kl_kernel, "row_kl", kl_rows=kl_rows, rows_out=out, TO_OUTPUT=out is not None)

    def finalize(
        self,
        kl_rows: Tensor | None,
        gradient: bool,
        row_grads: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Returns the sums of `kl_rows`, (R, N, A), and prepares the statistics for the gradient kernel."""
        from .row_stats import finalize_kernel

        values = torch.empty_like(self.head_stats[..., 0])
        self._launch_heads(
            finalize_kernel,
            FINALIZE_BLOCK,
            **self.stats,
            kl_rows=kl_rows,
            values=values,
            row_grads=row_grads,
            weights=weights,
            SELF_RELATION=self.self_relation,
            COMPUTE_KL=kl_rows is not None,
            GRADIENT=gradient,
            ROW_WEIGHTS=row_grads is not None,
            SHIFT=self._shift,
        )
        return values

    def gradients(self, row_weights: Tensor | None, grads: dict[tuple[int, int], Tensor]) -> None:
        """Fills the gradient buffers of the group's relations. `row_weights`: those of `finalize`, or None."""
        from .gradient import KEY, QUERY, SELF, gradient_kernel

        for role in (SELF,) if self.self_relation else (QUERY, KEY):
            owned = (self.call.inputs.relations[r][role.value == KEY.value] for r in self.relations)
            sums = [grads[r, m] for r, m in zip(self.relations, owned, strict=True)]
            group = self.group_s if role.value == KEY.value else 1
            outs = sums if group == 1 else [self._per_query_head(x) for x in sums]
            self._launch_tiles(
                gradient_kernel,
                "gradient",
                head_stats=self.head_stats,
                weights=self.call.weights if row_weights is None else row_weights,
                out=tuple(outs),
                ROLE=role.value,
                ROW_WEIGHTS=row_weights is not None,
                gradient_scale=self.scale_s * 2.0**-self._shift * self.call.weight,
            )
            if group > 1:
                for total, parts in zip(sums, outs, strict=True):
                    torch.sum(parts.unflatten(-2, (-1, group)), -2, out=total)

    def _per_query_head(self, grad: Tensor) -> Tensor:
        """Allocates one gradient per query head for the gradient of a key tensor, whose heads may be fewer."""
        call = self.call
        return call.new((*grad.shape[:-2], call.inputs.heads, grad.shape[-1]), covered=True)

    @property
    def _shift(self) -> float:
        """Exponent of a factor that keeps the gradient's float16 operands (about 1 / length, at most 2) in range."""
        return 14.0 if self.student[0].dtype == torch.float16 else 0.0

    def _launch_heads(self, kernel: Any, block: int, **arguments: Any) -> None:
        """Launches one program per relation, sequence and head. A program takes `block` rows at a time."""
        arguments |= {"head_stats": self.head_stats, "BLOCK": block}
        self._start(kernel, (self.programs,), arguments, FUSION)

    def _launch_tiles(self, kernel: Any, name: str, **arguments: Any) -> None:
        """Launches one program per tile of tokens."""
        from .primitives import BIDIRECTIONAL, PREFIX

        call = self.call
        itemsize_t, itemsize_s = self.teacher[0].itemsize, self.student[0].itemsize
        if interpreted():
            config = LaunchConfig.for_interpreter(call.positions, call.mask_constants["PACKED"])
        else:
            config = LaunchConfig.choose(
                name,
                max(self.operands["DP_T"], self.operands["DP_S"]),
                max(itemsize_t, itemsize_s),
                self.operands["PRECISION"],
                _gpu(call.inputs.mask.device)[1],
                call.mask_constants["MASK"] != BIDIRECTIONAL.value
                or not self.operands["ALIGN_T"] * itemsize_t == self.operands["ALIGN_S"] * itemsize_s == 16,
                call.mask_constants["HAS_INDICES"] and call.mask_constants["MASK"] == PREFIX.value,
            )
        tiles, sequence_of_tile = call.tile_grid(config.block_m)
        sequences = 1 if sequence_of_tile is not None else call.sequences
        arguments |= {
            **self.operands,
            **self.stats,
            "SLICED_T": sliced(self.operands["DP_T"], itemsize_t),
            "SLICED_S": sliced(self.operands["DP_S"], itemsize_s),
            "tiles": tiles,
            "tile_map": sequence_of_tile,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        grid = (call.inputs.heads * tiles * sequences * len(self.relations),)
        self._start(kernel, grid, arguments, config.options)

    def _start(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Launches a kernel with those arguments that it declares; the others are dropped."""
        available = {**self.sizes, **self.call.mask_arguments, **self.call.mask_constants, **arguments}
        given = {name: available[name] for name in kernel.arg_names if name in available}
        _start(self.call.inputs.mask.device, kernel, grid, given, options)


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Returns the number of multiprocessors of a GPU and its compute capability, such as 90; zeros for the CPU."""
    if device.type != "cuda":
        return 0, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU, or None. Tests compile for sm_90 with tensors on the CPU."""
    if interpreted() or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def tile_map(cu_seqlens: Tensor, total: int, block: int) -> Tensor:
    """Returns the sequence of each tile of `block` tokens, without waiting for the device.

    The first tile of sequence n, which starts at token c, is c // block + n. No two sequences share a tile, and
    total // block + N tiles are enough for any lengths.
    """
    sequences = cu_seqlens.numel() - 1
    ends = cu_seqlens[1:] // block + torch.arange(1, sequences + 1, device=cu_seqlens.device)
    tiles = torch.arange(total // block + sequences, device=cu_seqlens.device)
    return torch.searchsorted(ends, tiles, right=True).clamp_(max=sequences - 1)


def _aligned(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    """Returns the tensors in one dtype and with a last stride of 1, their other strides, and the unit of these."""
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    aligned = tuple(x.to(dtype) if x.stride(-1) == 1 or x.shape[-1] == 1 else x.to(dtype).contiguous() for x in tensors)
    strides = [s for x in aligned for s in ((0,) * (4 - x.dim()) + x.stride())[:3]]  # batch, token, head
    unit = math.gcd(16 // dtype.itemsize, *strides)
    return aligned, encode_integers(s // unit for s in strides), unit


def encode_integers(integers: Iterable[int]) -> tuple[int, ...]:
    """Returns 2 n + 3 of each integer. The kernels decode them.

    Triton compiles a kernel again if an integer in a tuple becomes 1 or a multiple of 16. These numbers never do.
    `do_not_specialize` has no effect in a tuple.
    """
    return tuple(2 * n + 3 for n in integers)


def _encode(indices: list[int]) -> int:
    """Packs tensor indices into an integer, 5 bits each."""
    return sum(index << 5 * k for k, index in enumerate(indices))


def _start(
    device: torch.device, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    with _on(device):
        kernel[grid](**arguments, **options)


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
