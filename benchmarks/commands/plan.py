"""All measurements on a CPU or a GPU, in one command and within a budget of minutes.

A plan lists stages, the most valuable first. Each command of a stage runs in its own process, within the stage's share
of the remaining budget. Each record is written to disk at once, so a stage that runs out of time keeps its records.
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
from typing import IO, NamedTuple

import torch

from benchmarks import toml_data
from benchmarks.measure import records
from benchmarks.reporting import sections

ROOT = Path(__file__).parents[2]
PLANS = Path(__file__).parents[1] / "plans"
_SUMMARY_LINES = 60
_TAIL = 12  # lines of a failed command in the summary


class Stage(NamedTuple):
    name: str
    about: str
    share: float  # weight in the division of the budget
    commands: Sequence[str]


def load(device: str) -> tuple[dict, list[Stage]]:
    """The settings and the stages of the plan for "cpu" or "gpu"."""
    settings = toml_data.load(PLANS / f"{device}.toml")
    return settings, [Stage(**stage) for stage in settings.pop("stage")]


def register(commands: argparse._SubParsersAction) -> None:
    for device in ("cpu", "gpu"):
        settings, stages = load(device)
        names = [stage.name for stage in stages]
        about = f"run all {device.upper()} measurements within a budget of minutes"
        parser = commands.add_parser(device, help=about, description=__doc__)
        add = parser.add_argument
        add("--minutes", type=float, default=settings["minutes"], help="budget of all stages together")
        add("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
        add("--dry-run", action="store_true", help="print the plan and run nothing")
        add("--out", type=Path, default=Path(settings["out"]), help="folder of the records, with one file per stage")
        add("--update", type=Path, nargs="*", default=[], help="Markdown files to update with tables and plots")
        add("--plots", type=Path, help="folder of the plots that --update links")
        parser.set_defaults(main=main, device=device)


def main(options: argparse.Namespace) -> int:
    """Return 1 if a stage failed. A stage that runs out of time has not failed."""
    if options.minutes <= 0:
        raise ValueError(f"--minutes: expected more than 0, got {options.minutes:g}")
    stages = [stage for stage in load(options.device)[1] if stage.name in options.only]
    missing = options.device == "gpu" and not torch.cuda.is_available()
    if options.dry_run or missing:
        _describe(stages, options, "no CUDA device here: this is the plan" if missing else "a dry run")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["MINILM_KERNELS_REVISION"] = records.revision()  # described before the committed records change
    begin = time.monotonic()
    outcomes: list[str] = []
    failed = False
    for number, stage in enumerate(stages):
        remaining = begin + 60 * options.minutes - time.monotonic()
        seconds = remaining * stage.share / sum(later.share for later in stages[number:])
        outcome, *tail = _run_stage(stage, options, seconds)
        failed |= outcome.startswith("failed")
        outcomes += [f"{stage.name:10} {outcome}", *tail]
        print(f"== {stage.name:10} {outcome}", file=sys.stderr, flush=True)
    _report(options)
    found = records.read(file for file in (_file(options, stage) for stage in stages) if file.exists())
    print(summary(outcomes, found, (time.monotonic() - begin) / 60))
    return int(failed)


def _report(options: argparse.Namespace) -> None:
    found = records.read([options.out])
    if found and options.device == "gpu":
        (options.out / "report.html").write_text(sections.page(found), encoding="utf-8")
    if found and options.plots is not None:
        sections.write_plots(found, options.plots)
    for file in options.update if found else ():
        sections.update_file(file, found, options.plots)


def _file(options: argparse.Namespace, stage: Stage, ending: str = "jsonl") -> Path:
    return options.out / f"{options.device}-{stage.name}.{ending}"


def _words(command: str, options: argparse.Namespace, file: Path) -> list[str]:
    program, *words = shlex.split(command)
    if program == "run":
        device = "cuda" if options.device == "gpu" else "cpu"
        words = ["-m", "benchmarks", "run", *words, "--device", device, "--out", str(file.resolve())]
    return [sys.executable if program in ("run", "python") else program, *words]


def _run_stage(stage: Stage, options: argparse.Namespace, seconds: float) -> list[str]:
    """The outcome, then the last lines of failed commands. The stage's file of records is replaced."""
    file, log = _file(options, stage), _file(options, stage, "log")
    file.unlink(missing_ok=True)
    begin = time.monotonic()
    tails: list[str] = []
    with log.open("w", encoding="utf-8") as output:
        for command in stage.commands:
            words = _words(command, options, file)
            output.write(f"$ {shlex.join(words)}\n")
            output.flush()
            start = output.tell()
            status = _call(words, output, begin + seconds)
            if status is None:
                return [f"stopped after its {seconds:.0f} s; {_count(file)} kept", *tails]
            if status:
                tail = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-_TAIL:]
                tails += [f"  {command[:100]}: status {status}", *(f"  | {line[:150]}" for line in tail)]
    if tails:
        return [f"failed; {_count(file)}; see {log}", *tails[:_TAIL]]
    if options.device == "cpu":
        log.unlink()
    return [f"done in {time.monotonic() - begin:.0f} s, {_count(file)}"]


def _count(file: Path) -> str:
    return f"{len(file.read_text(encoding='utf-8').splitlines()) if file.exists() else 'no'} records"


def _call(words: list[str], output: IO[str], end: float) -> int | None:
    """The exit status of a command; None if it ran past `end`. All processes that it started are stopped, too."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
    )
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def _describe(stages: Sequence[Stage], options: argparse.Namespace, why: str) -> None:
    print(f"{options.device}, {options.minutes:g} minutes, records to {options.out}: {why}.")
    for stage in stages:
        minutes = options.minutes * stage.share / sum(other.share for other in stages)
        print(f"{minutes:5.1f} min  {stage.name}: {stage.about}")
        print("".join(f"           {command}\n" for command in stage.commands), end="")
    print("run stands for python -m benchmarks run; records, logs and the final report are written to the folder")


def summary(outcomes: Sequence[str], found: Sequence[records.Record], minutes: float) -> str:
    """At most 60 lines: the outcomes of the stages, then problems, then measurements."""
    lines = [f"{minutes:.1f} minutes, {len(found)} records", *outcomes]
    bad = [r for r in found if r["status"] in ("wrong", "failed")]
    lines += [f"{r['status'].upper()}: {records.describe(r)}: {r['reason'] or ''}"[:160] for r in bad[:10]]
    if len(bad) > 10:
        lines.append(f"... and {len(bad) - 10} more that are wrong or failed")
    disturbed = sum(not records.measured_alone(r) for r in found)
    if disturbed:
        lines.append(f"DISTURBED: {disturbed} of the records were measured while other processes ran")
    results = [records.summarize(r)[:160] for r in found if r["status"] in ("ok", "oom") and r["suite"] != "accuracy"]
    room = _SUMMARY_LINES - len(lines) - 1
    lines += results[:room]
    if len(results) > room:
        lines.append(f"... and {len(results) - room} more: see the records")
    return "\n".join(lines[:_SUMMARY_LINES])
