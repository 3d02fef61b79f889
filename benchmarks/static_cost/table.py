"""Command line: `python -m benchmarks costs`, which makes the table by which `backend="auto"` chooses.

A row holds clocks per pair of one multiprocessor: bounds of the machine code, or times that were measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

from minilm_kernels.relation.costs import FILE, LENGTHS, WIDTHS, Work

from . import cost, cuda_loops, triton_loops
from .machine import MACHINES
from .variants import Variant, cuda_variant, triton_variant

_STUDENTS = {16: 8, 32: 16, 64: 32, 128: 64}  # width of the student by the teacher's
_HALVES = ("bfloat16", "float16")
_KINDS = {"qq": "self", "kk": "self", "vv": "self", "qk": "cross"}
Sizes = tuple[str, int, int]  # dtype, and the widths of teacher and student


def register(commands: Any) -> None:
    """Adds the subcommand `costs`."""
    parser = commands.add_parser(
        "costs",
        help="make the table by which `backend='auto'` chooses; needs no GPU",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=list(MACHINES), default=["sm_80", "sm_90"], metavar="sm_XX")
    parser.add_argument("--dtype", nargs="+", choices=[*_HALVES, "float32"], default=[*_HALVES, "float32"])
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS), metavar="D_t")
    parser.add_argument(
        "--measured", nargs="*", type=Path, default=[], metavar="FILE", help="records of losses on the first --arch"
    )
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE", help="other rows of the file are kept")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Writes the table after each architecture, dtype and width. Other rows of the file stay."""
    rows = {_key(row): row for row in json.loads(options.output.read_text())} if options.output.exists() else {}
    for arch in options.arch:
        for dtype in options.dtype:
            for width in options.widths:
                rows |= {_key(row): row for row in static_rows(arch, dtype, width)}
                write(options.output, rows.values())
    for path in options.measured:
        add_measured(rows, map(json.loads, path.read_text(encoding="utf-8").splitlines()), options.arch[0])
    write(options.output, rows.values())
    return 0


def _key(row: dict) -> tuple:
    return row["arch"], row["kind"], row["dtype"], row["width"], row["length"]


def write(path: Path, rows: Iterable[dict]) -> None:
    """Writes one row per line, sorted."""
    lines = ",\n".join(f" {json.dumps(row)}" for row in sorted(rows, key=_key))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def static_rows(
    arch: str,
    dtype: str,
    width: int,
    relations: Sequence[str] = ("self", "cross"),
    works: Sequence[str] = get_args(Work),
    lengths: Sequence[int] = LENGTHS,
) -> Iterator[dict]:
    """Yields rows of one dtype and width class, from bounds of the machine code."""
    number = int(arch.removeprefix("sm_"))
    sizes = (dtype, width, _STUDENTS[width])
    for relation in relations:
        for work in works:
            for length in lengths:
                of_triton, triton_per_head = _triton(relation, work, sizes, number, length)
                of_cuda, cuda_per_head = _cuda(relation, work, sizes, arch, length)
                clocks = {"cuda": _clocks(of_cuda, arch, length), "triton": _clocks(of_triton, arch, length)}
                yield {
                    "arch": number,
                    "kind": f"{relation} {work}",
                    "dtype": dtype,
                    "width": width,
                    "length": length,
                    "clocks": {name: round(value, 4) for name, value in clocks.items() if value is not None},
                    "per_head": ["cuda"] * cuda_per_head + ["triton"] * triton_per_head,
                    "source": "static",
                }


def _cuda(relation: str, work: str, sizes: Sizes, arch: str, length: int) -> tuple[list[Variant], bool]:
    """The kernels that the CUDA backend launches, and whether one of them has a block per head."""
    number = int(arch.removeprefix("sm_"))
    fits = cuda_loops.symmetric_bytes(*sizes, length) <= MACHINES[arch].shared - 1024
    if relation == "self" and work == "training" and fits:
        return [cuda_variant(cuda_loops.symmetric(*sizes, number), arch)], True
    if relation == "self" and work == "training" and cuda_loops.in_strips(*sizes):
        return [cuda_variant(cuda_loops.strips(*sizes, "self long", number), arch)], False
    group = f"{relation} {'evaluation' if work == 'evaluation' else 'row-wise'}"
    return [cuda_variant(kernel, arch) for kernel in cuda_loops.rows(*sizes, group)], False


def _triton(relation: str, work: str, sizes: Sizes, arch: int, length: int) -> tuple[list[Variant], bool]:
    """The kernels that the Triton backend launches, and whether one of them has a program per head.

    The kernel of unordered pairs has several programs per head if there are few heads.
    """
    dtype, width, _ = sizes
    group = relation if work == "training" else f"{relation} rows"
    if group == "self" and width <= 16 and dtype in _HALVES:
        group = f"self unordered {length}"
    left_out = {"training": "-", "evaluation": "gradient", "rows gradient": "row_kl"}[work]
    declared = triton_loops.variants_of(*sizes, group, arch)
    return [triton_variant(item, arch) for item in declared if not item.kernel.startswith(left_out)], False


def _clocks(variants: list[Variant], arch: str, length: int) -> float | None:
    """Returns the sum of the bounds of kernels, or None if one of them cannot be counted."""
    total = 0.0
    for variant in variants:
        try:
            rows = _rows(_Counted(variant), arch)
        except Exception as problem:  # a compiler may raise anything
            print(f"{variant.backend} {variant.name} {arch}: {type(problem).__name__}: {problem}", file=sys.stderr)
            return None
        phases: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            phases[row["phase"]].update(row["lengths"].get(str(length), {}).get("clocks_per_unit", {}))
        total += sum(max(units.values(), default=0.0) for units in phases.values())
    return total


class _Counted:
    """A variant that is equal to others of the same name."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.key = (variant.backend, variant.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Counted) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@cache
def _rows(counted: _Counted, arch: str) -> list[dict]:
    return cost.rows(counted.variant, arch, LENGTHS)


def add_measured(rows: dict[tuple, dict], records: Iterable[dict], arch: str) -> None:
    """Replaces the clocks of rows of which every backend was measured: losses with their gradients, without a mask.

    A bound and a measured time cannot be compared, so that a row has one or the other.
    """
    machine, measured = MACHINES[arch], defaultdict[tuple, dict[str, float]](dict)
    for record in records:
        shape = record["shape"]
        kinds = {_KINDS.get(name) for name in (shape["relations"] or "").split(",")}
        if (record["suite"], record["status"], record["mode"], shape["mask"]) != ("loss", "ok", "full", "none"):
            continue
        if record["provider"] not in ("cuda", "triton") or None in kinds or len(kinds) > 1:
            continue
        width = next((w for w in WIDTHS if w >= max(shape["d_t"], shape["d_s"])), None)
        key = (int(arch.removeprefix("sm_")), f"{kinds.pop()} training", record["dtype"], width, shape["S"])
        clocks = 1e6 * record["median_ms"] * machine.sms * machine.clock / record["pairs"]
        measured[key][record["provider"]] = round(clocks, 4)
    for key, clocks in measured.items():
        if key in rows and rows[key]["clocks"].keys() <= clocks.keys():
            rows[key] |= {"clocks": clocks, "source": "measured"}
