"""Command line of the benchmarks: `python -m benchmarks run --suite loss`, `python -m benchmarks report ROWS`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tqdm import tqdm

from minilm_kernels.demo.markers import update

from . import report, static
from .measure import loss_rows
from .providers import PROVIDERS
from .workloads import Workload

SHAPES = ["2x48x512x16x8", "4x12x512x64x32"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="measure and print one JSON line a measurement",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.add_argument("--suite", choices=["loss"], default="loss", help="loss: loss and gradient of self relations")
    run.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxAxSxD_txD_s", help="sizes to measure")
    run.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), metavar="NAME")
    run.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of the inputs")
    run.add_argument("--mask", choices=["none", "half", "causal"], default="none", help="half: half of it is padding")
    run.add_argument("--relations", type=int, default=1, help="self relations in one loss")
    run.add_argument("--seconds", type=float, default=20.0, help="time for the timed runs of one shape")
    run.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    run.add_argument("--out", type=Path, help="append the rows to this file as well")
    table = commands.add_parser("report", help="make tables of rows")
    table.add_argument("rows", type=Path, help="file that `run --out` wrote")
    table.add_argument("--update", type=Path, metavar="FILE", help="Markdown file that gets the tables, at its markers")
    static.register(commands)
    options = parser.parse_args(arguments)
    try:
        if options.command == "static":
            raise SystemExit(options.main(options))
        (_run if options.command == "run" else _report)(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _report(options: argparse.Namespace) -> None:
    text = report.markdown(report.read(options.rows))
    if options.update is None:
        print(text)
    else:
        update(options.update, "loss", text)


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    kind = {"relations": options.relations, "mask": options.mask, "dtype": options.dtype}
    workloads = [Workload.parse(text, **kind) for text in options.shapes]
    for workload in tqdm(workloads, desc="shapes", disable=None):
        rows = loss_rows(workload, options.providers, options.seconds)
        for row in rows:
            line = json.dumps(row)
            print(line, flush=True)
            if options.out is not None:
                with options.out.open("a") as file:
                    file.write(line + "\n")
        _summary(workload, rows)


def _summary(workload: Workload, rows: list[dict]) -> None:
    """A table for the eye: nanoseconds a pair, and how many times faster than eager."""
    eager = next((row["median_ms"] for row in rows if row["provider"] == "eager" and row["status"] == "ok"), None)
    columns = "".join(f"{name:>10}" for name in ("ms", "ns/pair", "x eager", "peak MiB", "error", "grad"))
    print(f"\n{workload}\n{'provider':14}{columns}")
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['provider']:14}{row['status']}: {row.get('reason', '')}")
            continue
        ratio = f"{eager / row['median_ms']:.2f}" if eager else ""
        print(
            f"{row['provider']:14}{row['median_ms']:10.1f}{1e6 * row['median_ms'] / row['pairs']:10.2f}{ratio:>10}"
            f"{row['peak_bytes'] / 2**20:10.1f}{row['error_value']:10.1e}{row['error_grad']:10.1e}"
        )


if __name__ == "__main__":
    main()
