"""Interrupts a small run of `minilm-distill` at its file operations, resumes it, and compares the results.

    python -m tests.distill.soak [--modes kill,half,...] [--keep 1,2] [--ranks 1,2] [--resume-too] [--damage]
                                 [--assistant] [--first N] [--last N] [--every N] [--seconds S]

A preloaded library (strike.c, compiled here with `cc`) counts every open, write, sync, rename, removal and new folder
below the run's output folder. At the n-th operation it kills the process, before or during the operation, makes the
operation fail, or sends a signal. The run is then continued with `--resume-from-checkpoint`. The run survives if no
partial checkpoint was ever visible, no complete checkpoint was lost, and its final student, metrics and files are equal
to those of an undisturbed run. The script needs Linux.

Without options, it tests all kinds of runs within five minutes, beginning with operations that are far apart.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("kill", "half", "term", "interrupt2", "eio", "eio-on", "full1", "full")  # in the order of strike.c, from 1
LIBRARY = "MINILM_KERNELS_STRIKE"
PATIENCE = 240.0
STEPS, STOPPED_AT = 6, 4


@dataclass
class Scenario:
    """A kind of run, and the file operations and the result of such a run without a disturbance."""

    keep: int
    ranks: int
    resumed: bool
    damaged: bool
    assistant: bool = False
    journal: list[tuple[str, str]] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        extra = (", resumed" if self.resumed else "") + (", newest damaged" if self.damaged else "")
        extra += ", through an assistant" if self.assistant else ""
        return f"keep {self.keep}, {self.ranks} ranks{extra}"


class Soak:
    """Runs in forked child processes, so that imports happen only once."""

    def __init__(self, work: Path) -> None:
        from tests.distill.tiny import make_texts, save_model

        self.work, self.output = work, work / "run"
        save_model(work / "teacher")
        (work / "text.txt").write_text("\n\n".join(make_texts(60, longest=30)), encoding="utf-8")
        self.strike = ctypes.CDLL(os.environ[LIBRARY]).strike_arm
        self.strike.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_char_p]
        self.log, self.journal = work / "log", work / "journal"

    def words(self, scenario: Scenario, resume: bool) -> list[str]:
        more = "--teacher-assistant 1x36 " if scenario.assistant else ""
        return shlex.split(
            f"--teacher {self.work}/teacher --text {self.work}/text.txt --output-dir {self.output} "
            "--student-num-hidden-layers 1 --student-hidden-size 24 --student-num-attention-heads 4 "
            f"--relation-heads 12 --max-seq-length 16 --total-batch-size 4 --learning-rate 1e-3 --max-steps {STEPS} "
            "--dropout 0.1 --eval-fraction 0.1 --eval-samples 4 --logging-steps 1 "
            f"--eval-steps 3 --save-steps 2 --save-total-limit {scenario.keep} --device cpu "
            + more
            + ("--resume-from-checkpoint" if resume else "")
        )

    def run(self, scenario: Scenario, *, resume: bool, at: int = 0, how: int = 0, stop: bool = False) -> list[int]:
        """Exit statuses of the ranks. Interrupts the first rank; if `stop`, by a signal in step `STOPPED_AT`."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port, which it has already
        children = []
        for rank in range(scenario.ranks):
            child = os.fork()
            if not child:
                self._child(scenario, rank, store.port, resume, at, how, stop)
            children.append(child)
        ends = [_wait(child, PATIENCE) for child in children]
        return [os.waitstatus_to_exitcode(end) for end in ends]

    def _child(
        self, scenario: Scenario, rank: int, port: int, resume: bool, at: int, how: int, stop: bool
    ) -> None:  # does not return
        status = 99
        try:
            log = os.open(f"{self.log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for handle in (1, 2):
                os.dup2(log, handle)
            if scenario.ranks > 1:
                os.environ |= {"WORLD_SIZE": str(scenario.ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            from minilm_kernels.distill import cli, loop

            if stop:
                real = loop.TrainingLoop._step

                def step(run: Any) -> None:
                    if run.state.step == STOPPED_AT - 1 and rank == 0:
                        os.kill(os.getpid(), signal.SIGTERM)
                    real(run)

                loop.TrainingLoop._step = step  # type: ignore[method-assign]
            if rank == 0:
                self.strike(os.fsencode(self.output), at, how, os.fsencode(self.journal))
            status = cli.main(self.words(scenario, resume))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def said(self, scenario: Scenario) -> str:
        return "".join(Path(f"{self.log}.{rank}").read_text(errors="replace") for rank in range(scenario.ranks))

    def prepare(self, scenario: Scenario) -> None:
        """Prepares the output folder for the run."""
        shutil.rmtree(self.output, ignore_errors=True)
        if scenario.resumed:
            name = f"stopped-{max(2, scenario.keep) if scenario.damaged else scenario.keep}-{scenario.ranks}"
            if not (self.work / name).exists():
                two = Scenario(int(name.split("-")[1]), scenario.ranks, False, False)
                ends = self.run(two, resume=False, stop=True)
                assert ends == [128 + signal.SIGTERM] * scenario.ranks, (ends, self.said(two))
                shutil.move(self.output, self.work / name)
            shutil.copytree(self.work / name, self.output)
            if scenario.damaged:
                file = self.output / "checkpoints" / f"step-{STOPPED_AT:09d}" / "optimizer.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"?")

    def measure(self, scenario: Scenario) -> None:
        """Measures the undisturbed run."""
        self.prepare(scenario)
        ends = self.run(scenario, resume=scenario.resumed)
        assert ends == [0] * scenario.ranks, self.said(scenario)
        lines = self.journal.read_text().splitlines()
        scenario.journal = [(what, path) for what, _, path in (line.partition("\t") for line in lines)]
        scenario.expected = self.outcome()

    def outcome(self) -> dict[str, Any]:
        """The content that must finally be equal: all files of the run, without timings."""
        found: dict[str, Any] = {}
        for path in self.output.rglob("*"):
            name = str(path.relative_to(self.output))
            if path.is_dir() or path.name == ".lock" or "checkpoints/" in name:
                found[name.partition("/damaged-")[0] if path.is_dir() else name] = None
            elif path.name == "metrics.jsonl":
                records = [json.loads(line) for line in path.read_text().splitlines()]
                found[name] = [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]
            elif path.name == "settings.json":
                found[name] = {**json.loads(path.read_text()), "resume_from_checkpoint": None}
            else:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return {name: value for name, value in found.items() if "/damaged-" not in name}

    def trial(self, scenario: Scenario, mode: str, at: int) -> str | None:
        """Runs a trial. Returns a description of the failure; None for success."""
        from minilm_kernels.distill.checkpoint import Checkpoints, read_checkpoint

        self.prepare(scenario)
        ends = self.run(scenario, resume=scenario.resumed, at=at, how=1 + MODES.index(mode))
        said = self.said(scenario)
        if "Traceback" in said:
            return f"a traceback (exit {ends}):\n{said}"
        if any(end == -signal.SIGALRM for end in ends):
            return f"a rank that does not end:\n{said}"
        right = {"kill": -9, "half": -9, "interrupt2": -2}.get(mode)
        if mode in ("kill", "half") and ends[0] != right:
            return f"ended with {ends} instead of {right}:\n{said}"

        for folder in (self.output / "assistant-1" / "checkpoints", self.output / "checkpoints"):
            # Checkpoints that were complete before the interruption: those of the start, and those renamed before it.
            before = (Path(path) for what, path in scenario.journal[: at - 1] if _is_whole(what, path))
            steps = [int(path.name.rpartition("-")[2]) for path in before if path.parent == folder]
            if scenario.resumed and folder.parent == self.output:
                steps.append(STOPPED_AT // 2 if scenario.damaged else STOPPED_AT)
            whole = []
            for found in Checkpoints(folder, 1).names():
                try:
                    whole.append(read_checkpoint(found).step)
                except ValueError as error:
                    if not (scenario.damaged and "optimizer.safetensors has a wrong checksum" in str(error)):
                        return f"a half checkpoint is visible: {error}"
            if steps and (not whole or max(whole) < max(steps)):
                return f"step {max(steps)} was lost, {whole or 'nothing'} is left"

        ends = self.run(scenario, resume=True)
        said = self.said(scenario)
        if ends != [0] * scenario.ranks:
            return f"--resume-from-checkpoint ended with {ends}:\n{said}"
        outcome, expected = self.outcome(), scenario.expected
        if mode in ("term", "interrupt2"):  # the run has saved another checkpoint instead of an older one
            outcome, expected = _without_older(outcome), _without_older(expected)
        other = sorted(
            name
            for name in {*outcome, *expected}
            if (name in outcome) != (name in expected) or outcome[name] != expected[name]
        )
        return f"other than the run left alone: {', '.join(other)}" if other else None


def _without_older(outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome, with the number of older checkpoints in place of their names."""
    older = [name for name in outcome if "checkpoints/" in name and f"step-{STEPS:09d}" not in name]
    return {**{name: value for name, value in outcome.items() if name not in older}, "older": len(older)}


def _is_whole(what: str, path: str) -> bool:
    return what == "rename" and Path(path).name.startswith("step-")


def _wait(child: int, patience: float) -> int:
    """The wait status of a child. A child that does not end is killed, and its status is SIGALRM."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return int(signal.SIGALRM)


def _points(scenario: Scenario, first: int, last: int, every: int) -> list[int]:
    """Sorts numbers of operations by their reversed bits, so that the first ones are far apart."""
    points = range(max(1, first), min(last or len(scenario.journal), len(scenario.journal)) + 1, every)
    return [points[i] for i in sorted(range(len(points)), key=lambda i: f"{i:020b}"[::-1])]


def _trials(soak: Soak, options: argparse.Namespace) -> Iterator[list[tuple[Scenario, str, int]]]:
    """Yields the trials of each scenario and mode."""
    resumed = [(False, False)]
    if options.resume_too or options.all:
        resumed.append((True, False))
    if options.damage or options.all:
        resumed.append((True, True))
    scenarios = [Scenario(keep, ranks, *how) for ranks in options.ranks for how in resumed for keep in options.keep]
    if options.assistant or options.all:
        scenarios += [Scenario(options.keep[0], ranks, False, False, assistant=True) for ranks in options.ranks]
    for scenario in scenarios:
        soak.measure(scenario)
        print(f"{scenario}: {len(scenario.journal)} operations", flush=True)
        for mode in options.modes:
            yield [(scenario, mode, at) for at in _points(scenario, options.first, options.last, options.every)]


def soak(options: argparse.Namespace, work: Path) -> bool:
    """Runs trials until the time is up. Returns True if all runs survived."""
    ending = time.monotonic() + options.seconds
    course = Soak(work)
    rounds = itertools.zip_longest(*_trials(course, options))
    trials = [trial for several in rounds for trial in several if trial is not None]
    survived = tried = 0
    for scenario, mode, at in trials:
        if time.monotonic() > ending:
            break
        tried += 1
        wrong = course.trial(scenario, mode, at)
        survived += wrong is None
        if wrong:
            what, path = scenario.journal[at - 1]
            where = Path(path).relative_to(course.output)
            print(f"{scenario}: {mode} at operation {at} ({what} {where}): {wrong}", flush=True)
    left = f"; {len(trials) - tried} of {len(trials)} points left out for want of time" if tried < len(trials) else ""
    print(f"survived {survived} of {tried}{left}")
    return survived == tried > 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", type=lambda text: text.split(","), help=f"some of {','.join(MODES)} (kill,half)")
    parser.add_argument("--keep", type=_numbers, help="checkpoints to keep (1,2)")
    parser.add_argument("--ranks", type=_numbers, help="processes (1,2)")
    parser.add_argument("--resume-too", action="store_true", help="also strike resumed runs")
    parser.add_argument("--damage", action="store_true", help="also strike runs that skip a damaged checkpoint")
    parser.add_argument("--assistant", action="store_true", help="also strike runs through a teacher assistant")
    parser.add_argument("--first", type=int, default=1, help="first operation to strike")
    parser.add_argument("--last", type=int, default=0, help="last operation to strike; 0: no limit")
    parser.add_argument("--every", type=int, default=1, help="strike every N-th operation only")
    parser.add_argument("--seconds", type=float, default=270.0, help="seconds after which no trial begins (270)")
    options = parser.parse_args(argv)
    also = (options.resume_too, options.damage, options.assistant)
    narrow = (options.modes, options.keep, options.ranks, *(choice or None for choice in also))
    options.all = all(choice is None for choice in narrow)
    options.modes = options.modes or ["kill", "half"]
    options.keep, options.ranks = options.keep or [1, 2], options.ranks or ([1, 2] if options.all else [1])
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"--modes: {', '.join(unknown)}: expected some of {', '.join(MODES)}")

    if LIBRARY not in os.environ:  # start again with the library preloaded
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            library = Path(folder) / "strike.so"
            source = Path(__file__).with_name("strike.c")
            compiler = shlex.split(os.environ.get("CC", "cc"))
            subprocess.run(
                [*compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=PATIENCE
            )
            environment = {LIBRARY: str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
            quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-m", __spec__.name, *(sys.argv[1:] if argv is None else argv)]
            environment = {**os.environ, **environment, **quiet}
            return subprocess.run(command, env=environment, timeout=options.seconds + 6 * PATIENCE).returncode

    import minilm_kernels.distill.loop  # noqa: F401  once, for all runs

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return 0 if soak(options, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
