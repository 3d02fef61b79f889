"""Declares the Triton kernels for the static cost: the compilations to examine, and the loops in each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minilm_kernels.relation.backends.triton import gradient, primitives, row_kl, row_stats, unordered
from minilm_kernels.relation.backends.triton.config import (
    FINALIZE_BLOCK,
    FUSION,
    PIVOT_BLOCK,
    TOTAL_BLOCK,
    LaunchConfig,
    diagonal_stages,
    float32_precision,
    padded_width,
    sliced,
)

from .variants import SourceLoop, Work

_DTYPES = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}


@dataclass(frozen=True)
class TritonVariant:
    """One compilation of a kernel."""

    kernel: str
    fn: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    divisible_by_16: tuple[str, ...]
    options: dict[str, Any]
    dtype: str
    d_t: int
    d_s: int
    loops: tuple[SourceLoop, ...]
    group: str


def variants(arch: int = 90) -> Iterator[TritonVariant]:
    """Yields the variants of each dtype: narrow and wide heads, each mask, self and cross relations."""
    for dtype in _DTYPES:
        yield from variants_of(dtype, 64, 32, "self", arch, per_head_kernels=True)
        yield from variants_of(dtype, 128, 128, "self", arch)
        if dtype == "float32":
            yield from variants_of(dtype, 16, 8, "self", arch, per_head_kernels=True)
            for group in ("self packed causal", "self padded prefix"):
                yield from variants_of(dtype, 16, 8, group, arch)
            yield from variants_of(dtype, 12, 6, "self", arch)
        else:
            yield from variants_of(dtype, 16, 8, "self unordered", arch, per_head_kernels=True)
            yield from variants_of(dtype, 12, 6, "self unordered", arch)
            for words in ("packed causal", "padded prefix", "split", "1024", "2048"):
                yield from variants_of(dtype, 16, 8, f"self unordered {words}", arch)
        for group in ("self rows", "cross", "cross padded prefix rows"):
            yield from variants_of(dtype, 16, 8, group, arch)


def _turns(kernel: str, mask: Any, length: int, block_m: int, block_n: int) -> tuple[int, int]:
    """Full and partial tiles that a kernel visits in a head. A prefix is as long as the sequence."""
    full = partial = 0
    whole, end = length // block_n, -(-length // block_n)
    for start in range(0, length, block_m):
        first, after = start // block_n, min(-(-(start + block_m) // block_n), end)  # tiles on the diagonal
        rest = max(0, whole - after)
        if mask == primitives.BIDIRECTIONAL or (mask == primitives.PREFIX and kernel != "gradient"):
            full, partial = full + whole, partial + end - whole
        elif kernel == "gradient":
            full, partial = full + first + rest, partial + end - first - rest
        elif kernel == "gradient of key":
            full, partial = full + rest, partial + end - first - rest
        else:
            full, partial = full + first, partial + after - first
    return full, partial


def variants_of(
    dtype: str, d_t: int, d_s: int, group: str, arch: int = 90, per_head_kernels: bool = False
) -> Iterator[TritonVariant]:
    """Yields the kernels of one loss with its gradient.

    Args:
        dtype: dtype of teacher and student.
        d_t: head width of the teacher.
        d_s: head width of the student.
        group: words that describe the call: "self" or "cross", "packed", "padded", "causal", "prefix", "rows" for
            `reduction="none"`, "unordered" for the kernel of unordered pairs, "1024" and "2048" for that many tokens
            instead of 512, and "split" for few heads.
        arch: compute capability, such as 90.
        per_head_kernels: also yield the kernels whose work does not grow with the number of pairs.
    """
    pointer, itemsize = _DTYPES[dtype]
    words = group.split()
    packed, padded, rows, self_relation = (word in words for word in ("packed", "padded", "rows", "self"))
    mask = primitives.BIDIRECTIONAL
    if "prefix" in words:
        mask = primitives.PREFIX
    elif "causal" in words:
        mask = primitives.CAUSAL
    width = padded_width(max(d_t, d_s))
    precision = float32_precision(width, divmod(arch, 10))
    constants = {
        "D_T": d_t,
        "D_S": d_s,
        "DP_T": padded_width(d_t),
        "DP_S": padded_width(d_s),
        "ALIGN_T": math.gcd(16 // itemsize, d_t),
        "ALIGN_S": math.gcd(16 // itemsize, d_s),
        "SLICED_T": sliced(padded_width(d_t), itemsize),
        "SLICED_S": sliced(padded_width(d_s), itemsize),
        "GROUP_T": 1,
        "GROUP_S": 1,
        "PRECISION": precision,
        "PACKED": packed,
        "HAS_INDICES": padded,
        "HAS_QUERY_MASK": False,
        "counted": None,
        "MASK": mask.value,
        "SHIFT": 14.0 if dtype == "float16" else 0.0,
        "ROW_WEIGHTS": rows,
        "SELF_RELATION": self_relation,
        "DG": 8 if d_s <= 8 else 16,
    }
    if not padded:
        constants["indices"] = None
    if not padded and not packed:
        constants["starts"] = None
    if mask != primitives.PREFIX:
        constants["prefixes"] = None
    if not packed:
        constants["tile_map"] = None
    if not (packed or padded or rows):
        constants["weights"] = None
    signature = {
        **dict.fromkeys(("teacher", "student"), (pointer,) * 3),
        **dict.fromkeys(("teacher_strides", "student_strides"), ("i32",) * 9),
        "relations": ("i32",) * 3,
        **dict.fromkeys(("scale_t", "scale_s", "gradient_scale", "weight"), "fp32"),
        **dict.fromkeys(primitives.UNSPECIALIZED["do_not_specialize"], "i32"),
        **dict.fromkeys(("sums", "pivots", "sum_t", "sum_s", "pivot_t", "pivot_s"), "*fp32"),
        **dict.fromkeys(("kl_rows", "values", "losses", "head_stats", "weights"), "*fp32"),
        **dict.fromkeys(("row_grads", "rows_out"), "*fp32"),
        "out": ("*fp32",) * 3,
        **dict.fromkeys(("indices", "prefixes", "tile_map"), "*i64"),
        "starts": "*i32" if packed else "*i64",
    }

    def variant(
        name: str, fn: Any, given: dict[str, Any], options: dict[str, Any], loops: tuple[SourceLoop, ...] = ()
    ) -> TritonVariant:
        values = {n: v for n, v in {**constants, **given}.items() if n in fn.arg_names}
        arguments = {n: "constexpr" if n in values else signature[n] for n in fn.arg_names}
        unaligned = primitives.UNSPECIALIZED["do_not_specialize_on_alignment"]
        pointers = tuple(n for n in arguments if "*" in str(arguments[n]) and n not in unaligned)
        return TritonVariant(
            kernel=name,
            fn=fn,
            signature=arguments,
            constants=values,
            divisible_by_16=pointers,
            options=options,
            dtype=dtype,
            d_t=d_t,
            d_s=d_s,
            loops=loops,
            group=group,
        )

    def tile_variant(name: str, fn: Any, kernel: str, **given: Any) -> TritonVariant:
        aligned = constants["ALIGN_T"] * itemsize == constants["ALIGN_S"] * itemsize == 16
        config = LaunchConfig.choose(
            kernel,
            width,
            itemsize,
            precision,
            arch,
            intricate=mask != primitives.BIDIRECTIONAL or not aligned,
            indices_and_prefix=padded and mask == primitives.PREFIX,
        )
        pairs = config.block_m * config.block_n
        features = padded_width(d_t) + padded_width(d_s) * (2 if kernel == "gradient" else 1)
        products = 1 if dtype != "float32" else 6 if precision == "bf16x6" else 0  # on tensor cores
        row_bytes = (d_t + d_s) * itemsize + (8 if kernel == "gradient" and "of query" not in name else 0)

        def loop(part: str, marker: str, copies: int) -> SourceLoop:
            def work(length: int) -> Work:
                turns = _turns(name, mask, length, config.block_m, config.block_n)
                mine = turns[1 if part else 0]
                return Work(mine, length**2 * mine / sum(turns))

            return SourceLoop(
                phase=name,
                pairs=pairs,
                exponentials=2 * pairs,
                tensor_macs=pairs * features * products,
                looped_macs=pairs * sum(dp for dp in map(padded_width, (d_t, d_s)) if sliced(dp, itemsize)),
                marker=marker,
                trips=0 if part else 512 / config.block_n,
                copies=copies,
                l2_bytes=config.block_n * row_bytes,
                part=part,
                work=work,
            )

        # With a causal or prefix mask, a self relation's gradient has one loop below and one above the diagonal.
        whole = loop("", kernel, 2 if name == "gradient" and mask != primitives.BIDIRECTIONAL else 1)
        bounds = loop("bounds", f"{kernel}+partial", 1)
        given |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        return variant(name, fn, given, config.options, (whole, bounds))

    def unordered_variants(longest: int, split: bool) -> Iterator[TritonVariant]:
        def config_of(length: int) -> LaunchConfig:
            return LaunchConfig.unordered((d_t, d_s), length, mask.value == primitives.BIDIRECTIONAL.value, arch)

        config = config_of(longest)
        features = padded_width(d_t) + padded_width(d_s)

        def loop(phase: str, tail: bool, on_diagonal: bool) -> SourceLoop:
            """Strips of block_m rows or, with `tail`, the strips of half as many at the end: other machine loops."""
            rows = config.block_m // 2 if tail else config.block_m
            tile = rows * config.block_n
            gradient = phase == "gradients"
            products = (8 if d_s <= 8 else 16) * gradient
            columns = 0 if on_diagonal else (4 * d_s if gradient else 8)  # additions to earlier rows

            def work(length: int) -> Work | None:
                if config_of(length) != config:
                    return None
                full = length // config.block_m * config.block_m
                starts = range(full, length, rows) if tail else range(0, full, rows)
                sizes = [min(rows, length - start) for start in starts]
                if on_diagonal:
                    turns = sum(-(-size // config.block_n) for size in sizes)
                    return Work(turns, sum(size * size for size in sizes))
                turns = sum(-(-start // config.block_n) for start in starts)
                pairs = sum(2 * start * size for start, size in zip(starts, sizes, strict=True))
                return Work(turns, pairs, entries=len(starts))

            return SourceLoop(
                phase,
                pairs=tile if on_diagonal else 2 * tile,
                exponentials=2 * tile,
                # Every warp computes the whole product for the 16 columns.
                tensor_macs=tile * (features + products * (1 if on_diagonal else 1 + config.num_warps)),
                marker=f"{phase}_diagonal" if on_diagonal else phase,
                # Heads of wide range have a loop of their own, with the same code for sums.
                copies=2 if tail and on_diagonal and not gradient else 1,
                l2_bytes=config.block_n * ((d_t + d_s) * itemsize + 8 + columns),
                part=f"{'tail ' * tail}{'diagonal' * on_diagonal}".strip(),
                work=work,
            )

        def loops_of(phase: str) -> tuple[SourceLoop, ...]:
            return tuple(loop(phase, tail, on_diagonal) for tail in (False, True) for on_diagonal in (False, True))

        loops = {"SUMS": loops_of("sums"), "INVERSES": (), "GRADIENT": loops_of("gradients")}
        given = {
            "SUM_STAGES": diagonal_stages(arch)[0],
            "STAGES": diagonal_stages(arch)[1],
            "WARPS": config.num_warps,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "SPLIT": split,
        }
        for phases in [[phase] for phase in loops] if split else [list(loops)]:
            name = f"unordered {phases[0].lower()}" if split else "unordered"
            flags = {phase: phase in phases for phase in loops}
            declared = tuple(source for phase in phases for source in loops[phase])
            yield variant(name, unordered.unordered_kernel, given | flags, config.options, declared)

    if "unordered" in words:
        yield from unordered_variants(next((int(word) for word in words if word.isdigit()), 512), "split" in words)
        if per_head_kernels:
            absent = {"relation_weights": None, "ADD": False}
            yield variant("total", unordered.total_kernel, absent | {"BLOCK": TOTAL_BLOCK}, FUSION)
        return
    if per_head_kernels:
        yield variant("pivot", row_stats.pivot_kernel, {"BLOCK": PIVOT_BLOCK}, FUSION)
    training_kl = {"COMPUTE_KL": not rows} | ({"kl_rows": None} if rows else {})
    yield tile_variant("row_stats", row_stats.row_stats_kernel, "row_stats", **training_kl)
    if rows:
        yield tile_variant("row_kl", row_kl.row_kl_kernel, "row_kl", TO_OUTPUT=True, kl_rows=None)
    if per_head_kernels or rows:
        absent = {} if rows else {"row_grads": None, "weights": None}
        given = {**training_kl, **absent, "GRADIENT": True, "BLOCK": FINALIZE_BLOCK}
        yield variant("finalize", row_stats.finalize_kernel, given, FUSION)
    roles = {"gradient of query": gradient.QUERY, "gradient of key": gradient.KEY}
    for name, role in ({"gradient": gradient.SELF} if self_relation else roles).items():
        yield tile_variant(name, gradient.gradient_kernel, "gradient", ROLE=role.value)
