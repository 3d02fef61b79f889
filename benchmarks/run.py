"""`python -m benchmarks run`: measure a suite, one JSON line a measurement; memory, step, inference: that suite."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch

from . import rows
from .providers import PROVIDERS
from .steps import MODES
from .suites import SUITES, measure
from .workloads import FAMILIES, MASKS

_UNITS = {"": 1, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"([\d.]+)(MiB|GiB|)")


def size(text: str) -> int:
    """Bytes, "512MiB" or "2GiB"."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 512MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def register(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("run", help="measure a suite", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--suite", choices=list(SUITES), default="loss", help="; ".join(map(": ".join, SUITES.items())))
    _add_options(parser)
    for name in ("memory", "step", "inference"):
        alias = commands.add_parser(
            name,
            help=f"the same as run --suite {name}",
            description=SUITES[name],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_options(alias)
        alias.set_defaults(suite=name)


def _add_options(parser: argparse.ArgumentParser) -> None:
    families = ", ".join(f"{name} = {f.about}, {f.A} heads" for name, f in FAMILIES.items())
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="where")
    add(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="loss, memory, accuracy: BxAxSxD_txD_s or FAMILY:BxS ("
        + families
        + "); inference: BxS; step: MODEL:BxS; memory: none leaves peaks out; by default the suite's own",
    )
    add("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), metavar="NAME", help="who")
    add("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"], default=["float32"], help="of the inputs")
    add("--masks", nargs="+", choices=MASKS, default=["none"], metavar="MASK", help=f"of {', '.join(MASKS)}")
    add("--relations", nargs="+", default=[None], metavar="PAIRS", help="such as qq,kk,vv or qk; default: the shape's")
    add("--modes", nargs="+", choices=MODES, default=["full"], help="loss: what is timed")
    add("--methods", nargs="+", choices=["events", "graph"], default=["events"], help="CUDA: how it is timed")
    add("--seconds", type=float, default=10.0, help="time for the timed runs of one shape")
    add(
        "--together",
        action="store_true",
        help="loss: all shapes, masks, dtypes and relations take turns, so that they compare on a restless machine",
    )
    add("--cap", type=float, default=30.0, help="seconds that one run may take")
    add("--memory", type=size, default=None if cuda else "2GiB", help="that one run may take beyond its inputs (CPU)")
    add("--budget", type=size, default="16GiB" if cuda else "1GiB", help="memory: what the largest batch has to fit")
    add(
        "--batches",
        nargs="+",
        metavar="SHAPE",
        help="memory: shapes (B is ignored) of largest batches; none: not these",
    )
    add("--most", type=int, help="memory: a larger batch is not sought")
    add("--largest", action="store_true", help="step: also at the largest batch that fits")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--out", type=Path, help="append the rows to this file as well")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    """Rows go to standard output and to `--out` as they are made; a table for the eye goes to standard error."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    for name in ("seconds", "cap", "threads"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name}: expected more than 0, got {getattr(options, name)}")
    # Children of this process and libraries that look at the environment shall have as many.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    for row in measure(options):
        if options.out is not None:
            rows.append(options.out, row)
        print(json.dumps(row), flush=True)
        print(line(row), file=sys.stderr, flush=True)


def line(row: rows.Row) -> str:
    """One measurement in one line for the eye."""
    what = rows.name(row)
    if row["status"] != "ok":
        return f"{what}: {row['status']} {row['reason'] or ''}"
    parts = []
    if row["median_ms"] is not None:
        parts.append(f"{row['median_ms']:.4g} ms")
        if row["pairs"]:
            parts.append(f"{1e6 * row['median_ms'] / row['pairs']:.3g} ns/pair")
    parts += [
        f"{name} {row[key] / 2**20:.1f} MiB"
        for name, key in (("peak", "peak_bytes"), ("saved", "saved_bytes"))
        if row[key] is not None
    ]
    parts += [
        f"{name} {row[key]:.1e}"
        for name, key in (("error", "error_value"), ("grad", "error_grad"))
        if row[key] is not None
    ]
    return f"{what}: {', '.join(parts)}"
