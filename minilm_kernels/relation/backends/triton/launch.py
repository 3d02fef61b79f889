"""Backend `triton`: runs on every GPU that Triton supports, for sequences of any length and head widths up to 128.

Relations of equal kind (self or cross), width and scale share each launch. The host never waits for the GPU. With
TRITON_INTERPRET=1 the kernels run on CPU tensors in Triton's interpreter, for tests. See docs/triton.md.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import RelationInputs, grad_buffers
from minilm_kernels.relation.masks import add_fault

from .config import FINALIZE_BLOCK, FUSION, PIVOT_BLOCK, LaunchConfig, float32_precision, padded_width, sliced

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_WIDTH = 128
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


def forward_reduced(inputs: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    call = _Call(inputs)
    weights = add_fault(weights, call.fault)
    values: list[Tensor] = [weights] * len(inputs.relations)  # placeholders; every group replaces its own values
    grads = call.new_gradients() if gradient else {}
    for group in call.groups() if call.has_tiles else []:
        kl_rows = group.new_row_stats()
        group.row_stats(kl_rows if gradient else None)
        if not gradient:
            group.row_kl(kl_rows, None)
        sums = group.finalize(kl_rows, gradient)
        if gradient:
            group.gradients(weights.contiguous(), False, grads)
        for value, r in zip(sums, group.relations, strict=True):
            values[r] = value
    if not call.has_tiles:
        return add_fault(call.new((len(values),)).zero_(), call.fault), list(grads.values())
    return (torch.stack(values).sum(-1) * weights).sum(-1).clamp_(min=0.0), list(grads.values())


def forward_none(inputs: RelationInputs) -> Tensor:
    call = _Call(inputs)
    *batch, positions = inputs.mask.token_shape
    out = call.new((len(inputs.relations), *batch, inputs.heads, positions), covered=True)
    for group in call.groups() if call.has_tiles else []:
        group.row_stats(None)
        group.row_kl(None, out)
    return add_fault(out, call.fault)


def backward_none(inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    call = _Call(inputs)
    row_grads = add_fault(row_grads.float(), call.fault).contiguous()
    grads = call.new_gradients()
    for group in call.groups() if call.has_tiles else []:
        weights = group.new_row_stats()
        group.row_stats(None)
        group.finalize(None, True, row_grads, weights)
        group.gradients(weights, True, grads)
    return list(grads.values())


@dataclass
class _Call:
    """The inputs of one call in the form that the kernels take, and the arguments that all groups share."""

    inputs: RelationInputs  # with a sanitized mask
    fault: Tensor | None = field(init=False)  # see Mask.sanitize_bounds
    sequences: int = field(init=False)
    positions: int = field(init=False)  # positions of a sequence; T for packed inputs
    total: int = field(init=False)  # B * S or T
    has_tiles: bool = field(init=False)  # False if there are no tokens; then nothing is launched
    mask_arguments: dict[str, Any] = field(init=False)
    mask_constants: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        from .primitives import BIDIRECTIONAL, CAUSAL, PREFIX

        mask, self.fault = self.inputs.mask.sanitize_bounds()
        self.inputs = replace(self.inputs, mask=mask)
        self.sequences = mask.num_sequences
        self.positions = mask.token_shape[-1]
        self.total = math.prod(mask.token_shape)
        self.has_tiles = self.total > 0 and self.sequences > 0
        indices, starts, prefixes = None, mask.cu_seqlens, mask.prefix_lens
        if mask.attention_mask is not None:
            indices, starts, prefixes = mask.unpad()
        self.mask_arguments = {
            "indices": indices,
            "starts": starts if starts is None else starts.contiguous(),
            "prefixes": prefixes if prefixes is None else prefixes.long().contiguous(),
            "counted": mask.counted.contiguous() if mask.query_mask is not None else None,
        }
        kind = BIDIRECTIONAL if mask.bidirectional else CAUSAL if prefixes is None else PREFIX
        self.mask_constants = {
            "PACKED": mask.packed,
            "HAS_INDICES": indices is not None,
            "HAS_QUERY_MASK": mask.query_mask is not None,
            "MASK": kind.value,
        }

    def new(self, shape: tuple[int, ...], covered: bool = False) -> Tensor:
        """Allocates float32. `covered`: the kernels write the entries of valid tokens only, so all others must be 0."""
        zeros = covered and (not self.has_tiles or self.inputs.mask.attention_mask is not None)
        return (torch.zeros if zeros else torch.empty)(shape, dtype=torch.float32, device=self.inputs.mask.device)

    def new_gradients(self) -> dict[tuple[int, int], Tensor]:
        buffers = grad_buffers(self.inputs.relations)
        return {(r, m): self.new(tuple(self.inputs.student[m].shape), covered=True) for r, m in buffers}

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
        return x.masked_fill(~self.inputs.mask.counted[..., None, None], 0) if clear else x

    def tile_grid(self, block: int) -> tuple[int, Tensor | None]:
        """Returns the number of tiles of `block` tokens per head and, for packed inputs, the sequence of each tile."""
        cu_seqlens = self.inputs.mask.cu_seqlens
        if cu_seqlens is None:
            return -(-self.positions // block), None
        sequences = tile_map(cu_seqlens, self.total, block)
        return sequences.numel(), sequences


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
        self.stats = {name: self.new_row_stats() for name in ("sum_t", "sum_s", "pivot_t", "pivot_s")}
        # (R, N, A, 4): teacher's pivot, student's pivot, 1 if they are shared, largest row weight.
        self.head_stats = call.new((len(relations), call.sequences, inputs.heads, 4))

    def new_row_stats(self) -> Tensor:
        """Allocates one float32 per row, (R, A, rows)."""
        return self.call.new((len(self.relations), self.call.inputs.heads, self.head_stride16 * 16))

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

    def gradients(self, weights: Tensor, row_weights: bool, grads: dict[tuple[int, int], Tensor]) -> None:
        """Fills the gradient buffers of the group's relations."""
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
                weights=weights,
                out=tuple(outs),
                ROLE=role.value,
                ROW_WEIGHTS=row_weights,
                gradient_scale=self.scale_s * 2.0**-self._shift,
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
        programs = self.head_stats[..., 0].numel()
        self._start(kernel, programs, arguments | {"head_stats": self.head_stats, "BLOCK": block}, FUSION)

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
        self._start(kernel, call.inputs.heads * tiles * sequences * len(self.relations), arguments, config.options)

    def _start(self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        """Launches a kernel with those arguments that it declares; the others are dropped."""
        available = {**self.sizes, **self.call.mask_arguments, **self.call.mask_constants, **arguments}
        with _device_of(self.head_stats):
            kernel[(programs,)](**{name: available[name] for name in kernel.arg_names if name in available}, **options)


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


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
