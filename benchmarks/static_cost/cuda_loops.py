"""Declares the CUDA C++ kernels for the static cost: which kernels to compile, and the loops in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .variants import SourceLoop, Work

_SPLITS = {"bfloat16": 1, "float16": 2, "float32": 3}
_TILE = 32  # rows and columns of a tile
_FORMATS = {"bfloat16": 1, "float16": 4, "float32": 5}  # tokens in the symmetric path (launch_params.h)
_STRIP_ROWS = {(16, 8): 64, (16, 16): 32, (32, 16): 32, (64, 32): 32}  # see symmetric_schedule
_WINDOW = {"bfloat16": 8, "float16": 8, "float32": 3}  # strips of a window of 64 rows on sm_90 (plan_segments)


@dataclass(frozen=True)
class CudaVariant:
    """One compiled kernel. `warps` of a block and `dynamic_shared` at S = 512 are for the occupancy."""

    kernel: str
    symbol: str
    group: str
    dtype: str
    d_t: int
    d_s: int
    warps: int
    loops: tuple[SourceLoop, ...]
    dynamic_shared: dict[str, int] | None = None


def variants(arch: int = 90) -> Iterator[CudaVariant]:
    """Yields every kind of kernel: strips and tiles, with each mask, and rows."""
    for dtype in ("bfloat16", "float16", "float32"):
        for widths in _STRIP_ROWS:
            if in_strips(dtype, *widths):
                yield strips(dtype, *widths, "self", arch)
        for group in ("self causal", "self prefix", "self long") if dtype != "float32" else ("self long",):
            yield strips(dtype, 16, 8, group, arch)
    for dtype, d_t, d_s in (("bfloat16", 128, 64), ("float32", 64, 32)):
        yield tiles(dtype, d_t, d_s)
    for dtype, d_t, d_s in (("bfloat16", 16, 8), ("bfloat16", 64, 32), ("float16", 16, 8), ("float32", 16, 8)):
        for group in ("self row-wise", "cross", "self evaluation"):
            yield from rows(dtype, d_t, d_s, group)


def _padded(width: int) -> int:
    return -(-width // 8) * 8


def symmetric(dtype: str, d_t: int, d_s: int, arch: int = 90) -> CudaVariant:
    """Returns the kernel of self relations, with its schedule: strips or tiles."""
    return strips(dtype, d_t, d_s, "self", arch) if in_strips(dtype, d_t, d_s) else tiles(dtype, d_t, d_s)


def in_strips(dtype: str, d_t: int, d_s: int) -> bool:
    """Returns whether the schedule of these heads is that of strips."""
    return (d_t, d_s) in _STRIP_ROWS and (dtype != "float32" or d_t <= 32)


def _score_macs(dtype: str, width: int) -> int:
    """Multiply-adds of a score: float32 tokens are three splits, of which six products count, and an offset."""
    return 6 * _padded(width) + 8 if dtype == "float32" else _padded(width)


def _gradient_products(dtype: str) -> int:
    """Products of a gradient: float32 tokens and score gradients are two float16 splits each."""
    return 3 if dtype == "float32" else 1


def symmetric_bytes(dtype: str, d_t: int, d_s: int, length: int) -> int:
    """Returns the shared memory of its blocks, as symmetric_bytes in launch_plan.cpp does."""
    t, s = _padded(d_t) // 8, _padded(d_s) // 8
    strips, wide = in_strips(dtype, d_t, d_s), dtype == "float32"
    planes = 3 * t + 1 + 5 * s + 1 if wide else t + s
    return 256 + length * (16 * planes + 32 * s + (32 if strips and wide else 16 if strips or wide else 8))


def _symmetric(dtype: str, d_t: int, d_s: int, group: str, loops: tuple[SourceLoop, ...]) -> CudaVariant:
    form, t, s = _FORMATS[dtype], _padded(d_t) // 8, _padded(d_s) // 8
    kernel, warps = ("segments", _WINDOW[dtype]) if "long" in group else ("symmetric", 8 if dtype == "float32" else 4)
    causal = int("causal" in group or "prefix" in group)
    shared = None if "long" in group else {"512": symmetric_bytes(dtype, d_t, d_s, 512)}
    return CudaVariant(kernel, f"{kernel}_{form}_{t}_{form}_{s}_{causal}", group, dtype, d_t, d_s, warps, loops, shared)


def _share_of_ex2(dtype: str, d_t: int, d_s: int, arch: int) -> float:
    """Share of the exponentials that are no polynomials (has_polynomials in launch_params.h)."""
    return 0.75 if arch == 100 and dtype != "float32" and _STRIP_ROWS[d_t, d_s] == 64 else 1.0


def strips(dtype: str, d_t: int, d_s: int, group: str, arch: int = 90) -> CudaVariant:
    """Returns the symmetric kernel of strips.

    `group`: "self", "self causal", "self prefix" (of the whole sequence), or "self long" for the kernel of heads that
    exceed shared memory.

    A turn of the source loop is a round of one strip: its rows meet the columns of a strip, 16 at a time.
    """
    rows = _STRIP_ROWS[d_t, d_s]
    tiles = rows // 16
    pairs, square = 2 * rows * rows, rows * rows
    scores = square * (_score_macs(dtype, d_t) + _score_macs(dtype, d_s))
    of_columns = square * _gradient_products(dtype) * _padded(d_s)
    gradient = scores + square * 16 + 2 * of_columns  # with the products of the factors

    def whole(length: int, share: Callable[[int], float] = lambda n: n * (n - 1) / 2, entries: bool = True) -> Work:
        n = length // rows
        left = 1 if length % rows else 0
        strips = n + left
        # A strip meets the columns of its own window and of half of the others, one window at a time.
        windows = (-(-strips // _WINDOW[dtype]) + 1) / 2 if "long" in group else 1
        return Work(share(n), share(n) * pairs, entries=strips * windows * entries)

    def later_rows(n: int) -> float:  # rounds in which the strip is later than the columns: they wrapped around
        return sum(d for d in range(1, (n + 1) // 2))

    def diagonal(length: int, left: int = 0) -> Work:
        """`left`: rows of a last strip with fewer rows, whose tiles meet all later ones of a strip."""
        n, steps = length // rows, -(-left // 16)
        squares = n * tiles * (tiles + 1) / 2 + steps * tiles - steps * (steps - 1) / 2
        turns = n + bool(left)
        return Work(turns, n * square + left**2, squares / max(1, turns * tiles * tiles))

    def tail(length: int, itself: bool) -> Work:
        """The last strip, if it has fewer rows: with all others and, perhaps, with itself."""
        n, left = divmod(length, rows)
        steps = -(-left // 16)
        squares = n * steps * tiles + itself * steps * (steps + 1) / 2
        turns = n + itself if left else 0
        pairs = length**2 - (n * rows) ** 2 - (0 if itself else left**2)
        return Work(turns, pairs, squares / max(1, turns * tiles * tiles))

    def loop(phase: str, part: str, marker: str, macs: int, work: Callable[[int], Work]) -> SourceLoop:
        mine = square if part == "diagonal" else pairs
        exponentials = round(pairs * _share_of_ex2(dtype, d_t, d_s, arch))
        branches = part in ("diagonal", "tail")
        return SourceLoop(
            phase, mine, exponentials, macs, marker, per="warp", part=part, conditional=branches, work=work
        )

    # Without a mask, a square has no product for its columns. The first 16 rows meet no other columns.
    on_diagonal = gradient - (of_columns * 16 // rows if group in ("self", "self long") else 0)
    phases = []
    if "causal" in group:
        earlier, later = "strip-sums-columns", "strip-sums-rows"
        phases.append(loop("sums", "", earlier, scores, lambda s: whole(s, lambda n: n * (n - 1) / 2 - later_rows(n))))
        phases.append(loop("sums", "later rows", later, scores, lambda s: whole(s, later_rows, entries=False)))
    else:
        phases.append(loop("sums", "", "strip-sums", scores, whole))
    itself = group in ("self", "self long")
    own = diagonal if itself else lambda s: diagonal(s, s % rows)
    phases.append(loop("sums", "diagonal", "strip-sums-square", scores, own))
    phases.append(loop("sums", "tail", "strip-sums-ragged", scores, lambda s: tail(s, itself)))
    phases.append(loop("gradient", "", "strip-gradient", gradient, whole))
    phases.append(loop("gradient", "diagonal", "strip-gradient-square", on_diagonal, lambda s: diagonal(s, s % rows)))
    phases.append(loop("gradient", "tail", "strip-gradient-ragged", gradient, lambda s: tail(s, False)))
    return _symmetric(dtype, d_t, d_s, group, tuple(phases))


def tiles(dtype: str, d_t: int, d_s: int) -> CudaVariant:
    """Returns the symmetric kernel of tiles."""
    square = _TILE * _TILE
    scores = square * (_score_macs(dtype, d_t) + _score_macs(dtype, d_s))
    gradient = scores + square * _gradient_products(dtype) * 2 * _padded(d_s)

    def loop(phase: str, part: str, marker: str, macs: int) -> SourceLoop:
        pairs = square if part else 2 * square

        def work(length: int) -> Work:
            n = -(-length // _TILE)
            turns = n if part else n * (n - 1) / 2
            return Work(turns, length**2 * turns * pairs / (n * _TILE) ** 2)

        return SourceLoop(phase, pairs, 2 * square, macs, marker, per="warp", part=part, work=work)

    loops = (
        loop("sums", "", "sums", scores),
        loop("sums", "diagonal", "sums-masked", scores),
        loop("gradient", "", "gradient", gradient),
        loop("gradient", "diagonal", "gradient-masked", gradient),
    )
    return _symmetric(dtype, d_t, d_s, "self", loops)


def rows(dtype: str, d_t: int, d_s: int, group: str) -> Iterator[CudaVariant]:
    """Yields the row-wise kernels of one loss.

    Args:
        dtype: dtype of teacher and student.
        d_t: head width of the teacher.
        d_s: head width of the student.
        group: "self" or "cross", then "evaluation" for a loss without gradient or the rows of `reduction="none"`. Other
            words are names only.
    """
    splits, t, s = _SPLITS[dtype], _padded(d_t) // 8, _padded(d_s) // 8
    both = group.startswith("self") and "evaluation" not in group
    form = _FORMATS[dtype] if both and dtype == "float32" else splits
    shape = f"{t}_{form}_{s}_{form}"
    products = {1: 1, 2: 4, 3: 6}[splits]
    square = _TILE * _TILE
    offsets = 8 if form == _FORMATS["float32"] else 0
    scores = square * (products * (_padded(d_t) + _padded(d_s)) + 2 * offsets)

    def variant(kernel: str, symbol: str, marker: str, exponentials: int, macs: int, turns: int = 1) -> CudaVariant:
        """`turns` of the loop make a tile. Without exponentials, it cannot be found out."""

        def work(length: int) -> Work:
            return Work(turns * (-(-length // _TILE)) ** 2, length**2)

        loop = SourceLoop(kernel, square // turns, exponentials, macs // turns, marker, per="warp", work=work)
        return CudaVariant(kernel, f"{symbol}_{shape}", group, dtype, d_t, d_s, 4, (loop,))

    def stats(exact: bool) -> CudaVariant:
        # One more exponential for each of a lane's 4 rows rescales its sum. Exact ones are polynomials.
        exponentials = 0 if exact else 2 * (square + 4 * _TILE)
        return variant("row_stats", f"row_stats_{int(exact)}", "", exponentials, scores)

    def row_wise(kernel: str, marker: str) -> CudaVariant:
        exponentials = 0 if splits == 3 else (4 if "+" in marker else 2) * square
        macs = scores + square * products * _padded(d_s)
        return variant(kernel, f"row_wise_{splits}", marker, exponentials, macs, 1 if exponentials else 2)

    if "evaluation" in group:
        yield stats(True)
        yield variant("row_wise", "row_wise_0", "", 0, scores, 2)
        return
    yield stats(splits == 3)
    if both:
        yield row_wise("row_wise both", "forward+backward")
    else:
        yield row_wise("row_wise query", "forward")
        yield row_wise("row_wise key", "backward")
