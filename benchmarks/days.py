"""`python -m benchmarks cpu` and `gpu`: everything worth measuring, in one command and a budget of minutes.

A plan is a list of stages, the most valuable first. Each stage runs in processes of its own, with a share of what is
left of the budget; rows are on the disk as soon as they are made, so a stage that is stopped, or a day that is killed,
keeps what it had.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import report, rows

_ROOT = Path(__file__).parents[1]
_SUMMARY_LINES = 60
_TAIL = 12  # lines of a failed command that the summary shows


class Stage(NamedTuple):
    """Commands, one after another; "run ..." is `python -m benchmarks run ... --out FILE`, others stand as they are."""

    name: str
    why: str
    share: float  # of the budget; what a stage leaves goes to those behind it
    commands: Sequence[str]


# S = 128 to 4096 at nearly constant pairs, then half precision, masks and cross relations at S = 512.
_LENGTHS = "32x48x128x16x8 8x48x256x16x8 2x48x512x16x8 1x24x1024x16x8 1x6x2048x16x8 1x2x4096x16x8"
_CASE = "2x48x512x16x8"
_CPU_DENSE = "--providers eager chunked torch.compile sdpa bertdistiller cpu torch"
CPU_PLAN = [
    Stage("loss", "every provider at two shapes", 6, [f"run {_CPU_DENSE} --seconds 20"]),
    Stage(
        "cases",
        "the C++ kernels: lengths at constant pairs, half precision, masks, cross relations, evaluation",
        5,
        [
            f"run --providers cpu --together --shapes {_LENGTHS} --seconds 4",
            f"run --providers cpu --together --shapes {_CASE} --dtypes float32 bfloat16 float16 --seconds 2",
            f"run --providers cpu --together --shapes {_CASE} --seconds 2 "
            "--masks none half lengths packed causal prefix",
            f"run --providers cpu --together --shapes {_CASE} --relations qq qk qq,kk,vv --seconds 2",
            f"run --providers cpu --shapes {_CASE} --modes forward --seconds 2",
            "run --providers cpu --together --shapes v1:4x512 --relations qq qk --seconds 2",
        ],
    ),
    Stage("accuracy", "backend × mask × dtype, small divergences", 2, ["run --suite accuracy --shapes 3x4x150x16x8"]),
    Stage("inference", "the published students against 12 × 768", 3, ["run --suite inference --seconds 12"]),
    Stage("step", "a distillation step by stages", 3, ["run --suite step --providers cpu eager --seconds 4"]),
    Stage(
        "memory",
        "the largest batch that fits, peak and saved bytes",
        5,
        [
            "run --suite memory --providers eager chunked sdpa cpu torch --budget 256MiB --shapes none",
            "run --suite memory --providers eager chunked sdpa cpu torch --batches none",
        ],
    ),
]
_HALF = "--dtypes bfloat16"
GPU_PLAN = [
    Stage(
        "build", "the native libraries, from the sources", 2, [f"{sys.executable} setup.py --quiet build_ext --inplace"]
    ),
    Stage(
        "tests",
        "every test that needs the device",
        3,
        [f"{sys.executable} -m pytest -m gpu --maxfail=20 --continue-on-collection-errors tests"],
    ),
    Stage("accuracy", "backend × mask × dtype against dense float64, small divergences", 2, ["run --suite accuracy"]),
    Stage(
        "loss",
        "every provider at the standard shapes, then graphs, lengths, masks and the other heads",
        5,
        [
            f"run {_HALF} --shapes v2-base:32x512 --seconds 6",
            f"run {_HALF} --shapes v2-base:256x512 --seconds 6",
            f"run {_HALF} --shapes v2-base:32x512 --methods graph --providers torch triton cuda --seconds 2",
            f"run {_HALF} --shapes v2-base:128x128 v2-base:64x256 v2-base:16x1024 v2-base:4x2048 v2-base:1x4096 "
            "--providers sdpa triton cuda --seconds 2",
            f"run {_HALF} --shapes v2-large:32x512 v2-large-768:32x512 v1:32x512 --seconds 3",
            f"run {_HALF} --shapes v2-base:32x512 --masks half lengths packed causal prefix "
            "--providers eager triton cuda --seconds 2",
            "run --dtypes float32 float16 --shapes v2-base:32x512 --providers eager sdpa triton cuda torch --seconds 2",
            f"run {_HALF} --shapes v2-base:32x512 --modes forward backward --providers eager triton cuda --seconds 2",
        ],
    ),
    Stage("memory", "largest batch in 16 GiB, peak and saved bytes", 2, [f"run --suite memory {_HALF}"]),
    Stage(
        "step",
        "the distillation step; where the eager loss does not fit, its largest batch",
        4,
        [f"run --suite step {_HALF} --providers triton cuda eager --seconds 5"],
    ),
    Stage("inference", "the published students against 12 × 768", 1, [f"run --suite inference {_HALF} --seconds 8"]),
]


def register(commands: argparse._SubParsersAction) -> None:
    for device, plan, minutes in (("cpu", CPU_PLAN, 8.0), ("gpu", GPU_PLAN, 25.0)):
        parser = commands.add_parser(
            device,
            help=f"the whole {device.upper()} day in one command and budget",
            description=__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        names = [stage.name for stage in plan]
        parser.add_argument("--minutes", type=float, default=minutes, help="budget of all stages together")
        parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
        parser.add_argument("--dry-run", action="store_true", help="say what would be done")
        out = report.RESULTS if device == "cpu" else Path("gpu-day")
        parser.add_argument("--out", type=Path, default=out, help="folder of the rows, a file a stage")
        parser.add_argument(
            "--update", type=Path, nargs="*", default=[], help="Markdown files that get tables and plots"
        )
        parser.add_argument("--plots", type=Path, help="folder of the plots that --update links")
        parser.set_defaults(main=main, day=device, plan=plan)


def main(options: argparse.Namespace) -> int:
    """Returns 1 where a stage failed; a stage that ran out of time is no failure."""
    if options.minutes <= 0:
        raise ValueError(f"--minutes: expected more than 0, got {options.minutes:g}")
    plan = [stage for stage in options.plan if stage.name in options.only]
    missing = options.day == "gpu" and not torch.cuda.is_available()
    if options.dry_run or missing:
        print(_describe(plan, options, "no CUDA device here: this is what would be done" if missing else "a dry run"))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["MINILM_KERNELS_REVISION"] = rows.revision()  # of the sources, before rows among them change
    begin = time.monotonic()
    deadline = begin + 60 * options.minutes
    outcomes: list[str] = []
    failed = False
    for number, stage in enumerate(plan):
        weights = sum(later.share for later in plan[number:])
        seconds = (deadline - time.monotonic()) * stage.share / weights
        outcome, detail = _run_stage(stage, options, seconds)
        failed |= outcome.startswith("failed")
        outcomes += [f"{stage.name:10} {outcome}", *detail]
        print(f"== {outcomes[-1 - len(detail)]}", file=sys.stderr, flush=True)
    found = rows.read(file for file in (_file(options, stage) for stage in plan) if file.exists())
    _reports(options)
    print(summary(outcomes, found, (time.monotonic() - begin) / 60))
    return int(failed)


def _reports(options: argparse.Namespace) -> None:
    everything = rows.read([options.out])
    if not everything:
        return
    page = options.out / "report.html" if options.day == "gpu" else None
    if page is not None:
        page.write_text(report.page(everything), encoding="utf-8")
    if options.plots is not None:
        report.write_plots(everything, options.plots)
    for file in options.update:
        report.update_file(file, everything, options.plots)


def _file(options: argparse.Namespace, stage: Stage) -> Path:
    return options.out / f"{options.day}-{stage.name}.jsonl"


def _commands(stage: Stage, options: argparse.Namespace) -> list[list[str]]:
    made = []
    for command in stage.commands:
        words = shlex.split(command)
        if words[0] == "run":
            device = "cuda" if options.day == "gpu" else "cpu"
            own = [sys.executable, "-m", "benchmarks", *words, "--device", device]
            words = [*own, "--out", str(_file(options, stage).resolve())]
        made.append(words)
    return made


def _run_stage(stage: Stage, options: argparse.Namespace, seconds: float) -> tuple[str, list[str]]:
    """How it went, and the last lines of commands that failed. The stage's file of rows begins anew."""
    file = _file(options, stage)
    file.unlink(missing_ok=True)
    log = options.out / f"{options.day}-{stage.name}.log"
    end = time.monotonic() + seconds
    failures: list[str] = []
    with log.open("w", encoding="utf-8") as output:
        for command, words in zip(stage.commands, _commands(stage, options), strict=True):
            output.write(f"$ {shlex.join(words)}\n")
            output.flush()
            start = output.tell()
            status = _call(words, output, end)
            if status is None:
                return f"stopped after its {seconds:.0f} s; {_count(file)} kept", failures
            if status:
                tail = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-_TAIL:]
                failures += [f"  {command[:100]}: status {status}", *(f"  | {line[:150]}" for line in tail)]
    if failures:
        return f"failed; {_count(file)}; see {log}", failures[:_TAIL]
    took = seconds - (end - time.monotonic())
    if options.day == "cpu":
        log.unlink()
    return f"done in {took:.0f} s, {_count(file)}", []


def _count(file: Path) -> str:
    return f"{len(file.read_text(encoding='utf-8').splitlines())} rows" if file.exists() else "no rows"


def _call(words: list[str], output, end: float) -> int | None:
    """The exit status, or None where it was not done by `end` and was stopped, with everything that it had started."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def _describe(plan: Sequence[Stage], options: argparse.Namespace, why: str) -> str:
    whole = sum(stage.share for stage in plan)
    lines = [f"{options.day}, {options.minutes:g} minutes, rows to {options.out}: {why}."]
    for stage in plan:
        lines.append(f"{options.minutes * stage.share / whole:5.1f} min  {stage.name}: {stage.why}")
        lines += [f"           {command.replace(sys.executable, 'python')}" for command in stage.commands]
    lines.append("run stands for python -m benchmarks run; a folder of rows, logs and, at the end, a report")
    return "\n".join(lines)


def summary(outcomes: Sequence[str], found: Sequence[rows.Row], minutes: float) -> str:
    """At most 60 lines: how the stages went, what is wrong, then the best of every comparison."""
    lines = [f"{minutes:.1f} minutes, {len(found)} rows", *outcomes]
    bad = [row for row in found if row["status"] in ("wrong", "failed")]
    lines += [f"{row['status'].upper()}: {rows.name(row)}: {row['reason'] or ''}"[:160] for row in bad[:10]]
    if len(bad) > 10:
        lines.append(f"... and {len(bad) - 10} more that are wrong or failed")
    disturbed = [row for row in found if _disturbed(row)]
    if disturbed:
        lines.append(f"DISTURBED: {len(disturbed)} of the rows were measured while others were at work")
    facts = []
    for row in found:
        if row["status"] == "ok" and row["suite"] == "step":
            detail = row["detail"]
            facts.append(
                f"{rows.name(row)}: {detail['tokens_per_s']:.4g} tokens/s, loss {100 * detail['loss_share']:.0f} %, "
                f"MFU {100 * detail['mfu']:.0f} %, recipe {detail['recipe_hours']:.3g} h"
            )
        elif row["status"] in ("ok", "oom") and row["suite"] in ("loss", "inference"):
            time_ms = "oom" if row["median_ms"] is None else f"{row['median_ms']:.4g} ms"
            facts.append(f"{rows.name(row)}: {time_ms}")
        elif row["status"] == "ok" and "budget_bytes" in row["detail"]:
            facts.append(f"{rows.name(row)}: the largest batch in {row['detail']['budget_bytes'] / 2**30:g} GiB")
    room = _SUMMARY_LINES - len(lines) - 1
    lines += [fact[:160] for fact in facts[:room]]
    if len(facts) > room:
        lines.append(f"... and {len(facts) - room} more: see the rows")
    return "\n".join(lines[:_SUMMARY_LINES])


def _disturbed(row: rows.Row) -> bool:
    """More processes wanted to run on the CPU than the measurement has threads."""
    if not row["clocks"] or "load" not in row["clocks"]:
        return False
    threads = int(row["device"].rsplit(", ", 1)[1].split()[0])
    return row["clocks"]["load"] > threads + 0.5
