"""`python -m benchmarks run`: measure a suite; `memory` and `inference` measure the suite of that name."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch

from benchmarks.measure import records
from benchmarks.measure.layouts import LAYOUTS
from benchmarks.measure.timed_loss import MODES
from benchmarks.measure.workload import FAMILIES, MASKS
from benchmarks.providers import PROVIDERS
from benchmarks.suites import SUITES, measure

_UNITS = {"": 1, "MiB": 2**20, "GiB": 2**30}


def size(text: str) -> int:
    """Number of bytes from text such as "512MiB" or "2GiB"."""
    match = re.fullmatch(r"([\d.]+)(MiB|GiB|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 512MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def register(commands: argparse._SubParsersAction) -> None:
    for name, suite in (("run", None), ("memory", "memory"), ("inference", "inference")):
        about = "measure a suite" if suite is None else f"the same as run --suite {suite}"
        parser = commands.add_parser(name, help=about, description=SUITES.get(name))
        if suite is None:
            choices = "; ".join(map(": ".join, SUITES.items()))
            parser.add_argument("--suite", choices=list(SUITES), default="loss", help=choices)
        _add_options(parser)
        parser.set_defaults(main=main, **({"suite": suite} if suite else {}))


def _add_options(parser: argparse.ArgumentParser) -> None:
    families = ", ".join(f"{n} = {A} heads of widths {t} and {s}, {r}" for n, (A, t, s, r) in FAMILIES.items())
    shapes = (
        f"loss, memory, accuracy: BxAxSxD_txD_s or FAMILY:BxS ({families}); inference: BxS; data: MODEL:BxS; "
        "train_step: MODEL:BxS, or MODEL:BxS:LAYOUT+LAYOUT; "
        "memory: none skips the peaks; by default, each suite has its own shapes"
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="device to measure on")
    add("--shapes", nargs="+", metavar="SHAPE", help=shapes)
    ours = "train_step: the backend of the device; other suites: all"
    add("--providers", nargs="+", choices=list(PROVIDERS), metavar="NAME", help=f"providers; default: {ours}")
    add("--dtypes", nargs="+", choices=["float32", "float16", "bfloat16"], default=["float32"], help="input dtypes")
    add("--masks", nargs="+", choices=MASKS, default=["none"], metavar="MASK", help=f"any of {', '.join(MASKS)}")
    add("--relations", nargs="+", default=[None], metavar="LIST", help="such as qq,kk,vv or qk; default: by shape")
    add("--modes", nargs="+", choices=MODES, default=["full"], help="loss: the timed part")
    add("--methods", nargs="+", choices=["events", "graph"], default=["events"], help="CUDA: the timing method")
    add("--seconds", type=float, default=10.0, help="duration of the timed runs of one shape")
    add("--interleave", action="store_true", help="loss: all shapes, masks, dtypes and relations take turns")
    add("--timeout", type=float, default=30.0, help="seconds that one run may take")
    add("--memory", type=size, default=None if cuda else "2GiB", help="CPU: memory of one run beyond its inputs")
    add("--budget", type=size, default="16GiB" if cuda else "1GiB", help="memory: the limit for the largest batch")
    batches = "memory: shapes for the search of the largest batch (B is ignored); none skips the search"
    add("--batches", nargs="+", metavar="SHAPE", help=batches)
    add("--max-batch", type=int, help="memory: the largest batch to try")
    layouts = "; ".join(f"{name}: {layout.about}" for name, layout in LAYOUTS.items())
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help=f"train_step: {layouts}")
    add("--rounds", type=int, default=6, help="train_step: the smallest number of runs of each step")
    add("--dropout", type=float, default=0.0, help="train_step: dropout of the student")
    add("--text", type=size, default="16MiB", help="data: size of the text that is prepared")
    preset = "train_step: the steps and the data of the acceptance lines, which are printed at the end"
    add("--preset", choices=["acceptance"], help=preset)
    add("--no-peaks", dest="peaks", action="store_false", help="train_step: leave out the peaks of memory")
    add("--variants", nargs="+", metavar="NAME", help="variants: names in plans/variants.toml; default: all")
    add("--repeat", type=int, default=20, help="variants: number of runs whose bits are compared")
    add("--repeat-only", action="store_true", help="variants: compare the bits and measure no time")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--out", type=Path, help="file to which the records are appended")


def main(options: argparse.Namespace) -> None:
    """Write records to standard output and `--out` as they are made, and a readable line to standard error."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    for name in ("seconds", "timeout", "threads", "rounds"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name}: expected more than 0, got {getattr(options, name)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for child processes
    torch.set_num_threads(options.threads)
    if options.providers is None:
        backend = "cuda" if options.device == "cuda" else "cpu"
        options.providers = [backend] if options.suite in ("train_step", "data") else list(PROVIDERS)
    for record in measure(options):
        if options.out is not None:
            records.append(options.out, record)
        print(json.dumps(record), flush=True)
        print(records.summarize(record), file=sys.stderr, flush=True)
