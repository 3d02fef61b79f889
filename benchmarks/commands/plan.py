"""All measurements on a CPU or a GPU, in one command and within a budget of minutes.

A plan lists steps, the most valuable first. On a GPU they have parts, which can be run one at a time. Each step has its
own time limit, and each of its commands has its own process. A step that fails, or needs a tool that is not installed,
does not stop the others. Each record is written to disk at once, so a step that runs out of time keeps its records. On
a GPU, a later run continues with the steps that are not done, and everything is packed into one archive.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from benchmarks import toml_data
from benchmarks.measure import records
from benchmarks.reporting import sections

ROOT = Path(__file__).parents[2]
PLANS = Path(__file__).parents[1] / "plans"
ARCHIVE_BYTES = 15 * 2**20  # all files of an archive; with their headers, it stays below 16 MiB
_LOG_BYTES = 2**18  # at the end of each log in an archive
_SUMMARY_LINES = 60
_TAIL = 12  # lines of a failed command in the summary
_TOOLS = ("/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*")  # folders outside PATH that may have the tools


class Step(NamedTuple):
    name: str
    about: str
    seconds: float  # a step gets this share of the time that is left, or more if the steps before it need less
    commands: Sequence[str]
    part: str = ""
    needs: Sequence[str] = ()  # programs and Python modules
    always: bool = False  # run again in every run, as the build


class Plan(NamedTuple):
    minutes: float  # budget of a part
    out: str
    steps: list[Step]

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(step.part for step in self.steps))


class Outcome(NamedTuple):
    """The end of a step: done, failed, stopped or skipped; an explanation; the last lines of failed commands."""

    status: str
    text: str
    tail: Sequence[str] = ()


def load(device: str) -> Plan:
    """The plan for "cpu" or "gpu"."""
    settings = toml_data.load(PLANS / f"{device}.toml")
    return Plan(steps=[Step(**step) for step in settings.pop("step")], **settings)


def register(commands: argparse._SubParsersAction) -> None:
    for device in ("cpu", "gpu"):
        plan = load(device)
        names = [step.name for step in plan.steps]
        about = f"run all {device.upper()} measurements within a budget of minutes"
        parser = commands.add_parser(device, help=about, description=__doc__)
        add = parser.add_argument
        add("--minutes", type=float, default=plan.minutes, help="budget of the steps, or of each part")
        if len(plan.parts) > 1:
            add("--part", choices=plan.parts, help="run the steps of this part only")
            add("--restart", action="store_true", help="also repeat the steps that an earlier run has done")
            add("--archive", type=Path, help="file of the archive; default: the folder's name with .tar.gz")
        else:
            parser.set_defaults(part=None, restart=True)
        add("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
        add("--dry-run", action="store_true", help="print the plan and run nothing")
        add("--out", type=Path, default=Path(plan.out), help="folder of the records, with one file per step")
        add("--update", type=Path, nargs="*", default=[], help="Markdown files to update with tables and plots")
        add("--plots", type=Path, help="folder of the plots that --update links")
        parser.set_defaults(main=main, device=device)


def main(options: argparse.Namespace) -> int:
    """Return 1 if a step failed. A step that runs out of time or is skipped has not failed."""
    if options.minutes <= 0:
        raise ValueError(f"--minutes: expected more than 0, got {options.minutes:g}")
    plan = load(options.device)
    parts = [options.part] if options.part else plan.parts
    chosen = [step for step in plan.steps if step.part in parts and step.name in (options.only or [step.name])]
    missing = options.device == "gpu" and not torch.cuda.is_available()
    if options.dry_run or missing:
        _describe(chosen, options, "no CUDA device here: this is the plan" if missing else "a dry run")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["MINILM_KERNELS_REVISION"] = records.revision()  # described before the committed records change
    run = _Run(options)
    for part in parts:
        run.steps([step for step in chosen if step.part == part])
    print(run.report())
    return int(run.failed)


class _Run:
    """Steps that have ended, in the folder of the records."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.outcomes: list[str] = []
        self.tails: list[str] = []
        self.files: list[Path] = []
        self.failed = False
        self._state = options.out / "state.json"
        self._continues = options.device == "gpu"
        self._environment = _environment()

    def steps(self, steps: Sequence[Step]) -> None:
        """Runs the steps of a part within its budget."""
        end = time.monotonic() + 60 * self.options.minutes
        lacking = {step.name: [need for need in step.needs if not self._has(need)] for step in steps}
        waiting = [step for step in steps if not lacking[step.name] and not self._is_done(step)]
        for step in steps:
            if lacking[step.name]:
                outcome = Outcome("skipped", f": {' and '.join(lacking[step.name])} not installed")
            elif step not in waiting:
                outcome = Outcome("done", " in an earlier run")
            else:
                later = sum(other.seconds for other in waiting[waiting.index(step) :])
                seconds = max(0.0, end - time.monotonic()) * step.seconds / later
                outcome = self._run(step, seconds)
            self.files.append(self._file(step))
            self.failed |= outcome.status == "failed"
            self.outcomes.append(f"{step.name:14} {outcome.status}{outcome.text}")
            self.tails += outcome.tail
            print(f"== {self.outcomes[-1]}", file=sys.stderr, flush=True)
            if self._continues:
                self._keep(step, outcome)

    def _run(self, step: Step, seconds: float) -> Outcome:
        file, log = self._file(step), self._file(step, "log")
        if not self._continues:
            file.unlink(missing_ok=True)
        before, begin = len(_rows(file)), time.monotonic()
        tail: list[str] = []
        with log.open("a" if self._continues else "w", encoding="utf-8") as output:
            for command in step.commands:
                words = _words(command, self.options.device, file)
                output.write(f"$ {shlex.join(words)}\n")
                output.flush()
                start = output.tell()
                status = _call(words, output, begin + seconds, self._environment)
                if status is None:
                    return Outcome("stopped", f" after its {seconds:.0f} s; {_made(file, before)} kept", tail)
                if status:
                    last = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-_TAIL:]
                    tail += [f"  {command[:100]}: status {status}", *(f"  | {line[:150]}" for line in last)]
        if tail:
            return Outcome("failed", f"; {_made(file, before)}; see {log}", tail[: _TAIL + 1])
        if not self._continues:
            log.unlink()
        return Outcome("done", f" in {time.monotonic() - begin:.0f} s, {_made(file, before)}")

    def report(self) -> str:
        """Writes the tables and the archive, and returns the summary."""
        found = records.read(file for file in dict.fromkeys(self.files) if file.exists())
        self._attempt("tables and plots", lambda: _write_tables(self.options))
        text = summary([*self.outcomes, *self.tails], found, (time.monotonic() - self.begin) / 60)
        if self._continues:
            (self.options.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
            self._attempt("archive", self._pack)
        return text

    def _attempt(self, what: str, work: Callable[[], Any]) -> None:
        """Does work whose failure must not lose the records; it is reported like that of a step."""
        try:
            work()
        except Exception as error:
            if not self._continues:
                raise
            self.failed = True
            self.outcomes.append(f"{what}: failed: {type(error).__name__}: {error}"[:200])

    def _keep(self, step: Step, outcome: Outcome) -> None:
        """Writes the outcome for later runs, and packs the archive: the run may be killed at any time."""
        state = self._read_state() | {step.name: {"outcome": outcome.status, "revision": records.revision()}}
        self._state.write_text(json.dumps(state, indent=1), encoding="utf-8")
        (self.options.out / "summary.txt").write_text("\n".join([*self.outcomes, *self.tails, ""]), encoding="utf-8")
        self._attempt("archive", self._pack)

    def _read_state(self) -> dict[str, dict[str, str]]:
        try:
            return json.loads(self._state.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the first run, or one that was killed here
            return {}

    def _is_done(self, step: Step) -> bool:
        if self.options.restart or self.options.only or step.always:
            return False
        kept = self._read_state().get(step.name)
        return kept == {"outcome": "done", "revision": records.revision()}

    def _pack(self) -> None:
        pack(self.options.out, self.options.archive or Path(f"{self.options.out}.tar.gz"))

    def _has(self, need: str) -> bool:
        path = self._environment["PATH"]
        return shutil.which(need, path=path) is not None or importlib.util.find_spec(need) is not None

    def _file(self, step: Step, ending: str = "jsonl") -> Path:
        return self.options.out / f"{self.options.device}-{step.name}.{ending}"


def _environment() -> dict[str, str]:
    """The environment of the commands, which use no network and find the tools of a CUDA toolkit."""
    folders = [str(path) for pattern in _TOOLS for path in Path("/").glob(pattern.lstrip("/")) if path.is_dir()]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    return os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def _words(command: str, device: str, file: Path) -> list[str]:
    """The words of a command. "python" is this Python, "run" is `python -m benchmarks run`; a tool may precede them."""
    words = shlex.split(command)
    place = next((n for n, word in enumerate(words) if word in ("run", "python")), None)
    if place is None:
        return words
    if words[place] == "python":
        return [*words[:place], sys.executable, *words[place + 1 :]]
    options = ["--device", "cuda" if device == "gpu" else "cpu", "--out", str(file.resolve())]
    return [*words[:place], sys.executable, "-m", "benchmarks", *words[place:], *options]


def _rows(file: Path) -> list[records.Record]:
    return records.read([file]) if file.exists() else []


def _made(file: Path, before: int) -> str:
    """The number of records after the first ones, and of those that report a problem."""
    made = _rows(file)[before:]
    bad = sum(record["status"] in ("wrong", "failed") for record in made)
    return f"{len(made)} records{f', {bad} of them wrong or failed' if bad else ''}"


def _call(words: list[str], output: IO[str], end: float, environment: dict[str, str]) -> int | None:
    """The exit status of a command; None if it ran past `end`. All processes that it started are stopped, too."""
    try:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    except OSError as error:
        output.write(f"{error}\n")
        output.flush()
        return 127
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # at SIGINT, pytest reports failures so far
            try:
                os.killpg(process.pid, number)
                process.wait(4)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def _write_tables(options: argparse.Namespace) -> None:
    found = records.read([options.out])
    if found and options.device == "gpu":
        (options.out / "report.html").write_text(sections.page(found), encoding="utf-8")
    if found and options.plots is not None:
        sections.write_plots(found, options.plots)
    for file in options.update if found else ():
        sections.update_file(file, found, options.plots)


def pack(folder: Path, archive: Path) -> None:
    """Packs the files of a folder, small and important ones first, up to `ARCHIVE_BYTES`; of logs, the ends only."""
    order = ("summary.txt", "state.json", "*.jsonl", "*.log", "report.html")
    files = dict.fromkeys(file for pattern in order for file in sorted(folder.glob(pattern)))
    room = ARCHIVE_BYTES
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(f"{archive.name}.unfinished")
    with tarfile.open(unfinished, "w:gz") as packed:
        for file in files:
            content = file.read_bytes()
            content = content[-min(room, _LOG_BYTES if file.suffix == ".log" else room) :] if room else b""
            entry = tarfile.TarInfo(f"{folder.name}/{file.name}")
            entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
            packed.addfile(entry, BytesIO(content))
            room -= len(content)
    unfinished.replace(archive)


def _describe(steps: Sequence[Step], options: argparse.Namespace, why: str) -> None:
    print(f"{options.device}, {options.minutes:g} minutes, records to {options.out}: {why}.")
    for step in steps:
        minutes = options.minutes * step.seconds / sum(other.seconds for other in steps if other.part == step.part)
        print(f"{minutes:5.1f} min  {step.part}{' ' if step.part else ''}{step.name}: {step.about}")
        print("".join(f"           {command}\n" for command in step.commands), end="")
    print("run stands for python -m benchmarks run; records, logs and the final report are written to the folder")


def summary(outcomes: Sequence[str], found: Sequence[records.Record], minutes: float) -> str:
    """At most 60 lines: the outcomes of the steps, then problems, then measurements."""
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
