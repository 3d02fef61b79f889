"""Command line: `python -m benchmarks static [--arch sm_90] [--json]`."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from examples.demo.markers import check_markers, update

from . import cost
from .machine import MACHINES
from .variants import CUDA_MODULE, TRITON_MODULE, Variant, cuda_variants, triton_variants

_SECTION = "static"  # name of the markers in a Markdown file
_NAME = 60  # width of the first column
_COLUMNS = {  # heading -> key, digits
    "share": ("share", 3),
    "MUFU": ("mufu_per_pair", 2),
    "slots": ("issue_slots_per_pair", 2),
    "always": ("issue_slots_always_per_pair", 2),
    "tensor": ("tensor_per_pair", 3),
    "shared": ("shared_per_pair", 3),
    "waves": ("shared_wavefronts_per_pair", 3),
    "global": ("global_per_pair", 3),
    "outer": ("outer_slots_per_pair", 2),
    "regs": ("registers", 0),
    "spill": ("spill_bytes", 0),
    "smem": ("shared_bytes", 0),
    "warps/SM": ("warps_per_sm", 0),
    "clocks": ("clocks_per_pair", 4),
}


def register(commands) -> None:
    """Adds the subcommand `static`."""
    parser = commands.add_parser(
        "static",
        help="count what the GPU kernels execute per ordered pair in their machine code; needs no GPU",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", choices=list(MACHINES), default=["sm_90"], metavar="sm_XX")
    parser.add_argument("--backends", nargs="+", choices=["triton", "cuda"], default=["triton", "cuda"], metavar="NAME")
    parser.add_argument("--triton-module", default=TRITON_MODULE, metavar="MODULE", help="module with variants()")
    parser.add_argument(
        "--cuda-module", default=CUDA_MODULE, metavar="MODULE", help="module with variants(), or a JSON file of kernels"
    )
    parser.add_argument("--kernel", default="*", help="only kernels whose name matches this pattern")
    parser.add_argument("--group", nargs="+", default=["*"], help="only groups that match one of these patterns")
    parser.add_argument("--dtype", default="*", help="only this dtype of the inputs")
    parser.add_argument("--widths", default="*", metavar="D_txD_s", help="only these widths, such as 16x8")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=list(cost.LENGTHS), metavar="S", help="of totals with the diagonal"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, one per phase, and totals")
    parser.add_argument(
        "--breakdown", action="store_true", help="print issue slots per pair by class of instruction and opcode"
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="Markdown file whose table is updated")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Prints each row when it is ready, then the totals. Returns 1 if a kernel failed."""
    if options.update is not None:
        check_markers(options.update, _SECTION)
    phases: list[dict] = []
    failures: list[str] = []
    if not options.json:
        headings = (*_COLUMNS, *(f"ms {shape}" for shape in cost.SHAPES))
        print(" " * _NAME + "".join(f"{heading:>9}" for heading in headings), flush=True)
    for arch, variant in _declared(options):
        try:
            rows = cost.rows(variant, arch, options.lengths)
        except Exception as problem:  # a compiler may raise anything; the other kernels are still counted
            failures.append(f"{variant.backend} {variant.name} {arch}: {type(problem).__name__}: {problem}")
            continue
        phases += rows
        if not options.json:
            for row in rows:
                _print(row, options.breakdown)
    if not phases and not failures:
        raise ValueError(f"no kernel of {', '.join(options.backends)} matches")
    totals, repeated = cost.totals(phases)
    if options.json:
        print(json.dumps(phases + totals, indent=1))
    else:
        for row in totals:
            _print(row, False)
        for arch in options.arch:
            machine = MACHINES[arch]
            print(
                f"{arch}: bounds are estimates for {machine.name}, {machine.sms} SMs at {machine.clock} GHz; "
                "A = 48, S = 512, three relations"
            )
    if options.update is not None and not failures:
        update(options.update, _SECTION, _markdown(phases + totals))
    for failure in failures + repeated:
        print(failure, file=sys.stderr)
    return 1 if failures or repeated else 0


def _declared(options: argparse.Namespace) -> Iterator[tuple[str, Variant]]:
    """The chosen kernels of the chosen backends, for each architecture."""
    for arch in options.arch:
        declared: list[Variant] = []
        if "triton" in options.backends:
            declared += triton_variants(arch, options.triton_module)
        if "cuda" in options.backends:
            declared += cuda_variants(arch, options.cuda_module)
        for variant in declared:
            values = (variant.kernel, variant.dtype, f"{variant.d_t}x{variant.d_s}")
            patterns = (options.kernel, options.dtype, options.widths)
            grouped = any(fnmatch.fnmatch(variant.group, pattern) for pattern in options.group)
            if grouped and all(map(fnmatch.fnmatch, values, patterns)):
                yield arch, variant


def _markdown(rows: list[dict]) -> str:
    """Returns a Markdown table of the loops over whole tiles and of the totals at each length, grouped by dtype."""
    headings = ("architecture", "dtype", "widths", "kernel", "exponentials", "issue slots", "registers", "spill bytes")
    table = [headings, ("---",) * len(headings)]
    shown = [row for row in rows if row["phase"] not in ("outside", "total") and not row["part"]]
    for row in sorted(shown, key=lambda row: (row["arch"], row["dtype"], row["group"])):
        length = row["phase"].startswith("S=")
        phase = f", {row['phase']}" if length else "" if row["phase"] == row["kernel"] else f" {row['phase']}"
        kernel = f"{row['kernel']}{phase} [{row['group']}]".replace("+", " + ").replace("=", " = ")
        figures = (f"{row['mufu_per_pair']:.2f}", f"{row['issue_slots_per_pair']:.2f}", row["registers"])
        table.append((row["arch"], row["dtype"], f"{row['d_t']}, {row['d_s']}", kernel, *figures, row["spill_bytes"]))
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in table]
    return "\n".join([*lines, "", f"Exponentials and issue slots are counted per pair. Triton {version('triton')}."])


def _name(row: dict) -> str:
    phase = f"{'' if row['phase'] == row['kernel'] else row['phase']} {row['part']}".strip()
    return f"{row['arch']} {row['kernel']} [{row['group']}] {phase} {row['dtype']} {row['d_t']}x{row['d_s']}"


def _print(row: dict, breakdown: bool) -> None:
    cells = [f"{row[key]:9.{digits}f}" if key in row else f"{'-':>9}" for key, digits in _COLUMNS.values()]
    times = [f"{row['bound_ms'][shape]:9.2f}" for shape in cost.SHAPES]
    print(f"{_name(row):{_NAME}}" + "".join(cells + times) + f"  {row.get('bound_by', '')}".rstrip(), flush=True)
    for note in row.get("notes", ()):
        print(f"    {note}")
    if not breakdown or not row["breakdown"]:
        return
    for other in row["other_loops"]:
        print(f"    other loop: {other}")
    print("    issue slots per pair by class and opcode; clocks per pair by unit:")
    for name, slots in row["breakdown"].items():
        opcodes = ", ".join(f"{opcode} {number:.3f}" for opcode, number in row["opcodes"][name].items())
        print(f"    {name:14}{slots:8.3f}   {opcodes}")
    print("    " + ", ".join(f"{unit} {clocks:.4f}" for unit, clocks in row["clocks_per_unit"].items()))
