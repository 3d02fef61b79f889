"""Suite `variants`: variants of the kernels' schedules (warps, stages, registers), timed in turns within one run.

A variant is a copy of the sources in which one constant differs (plans/variants.toml). Each has its own process, which
compiles its kernels, checks loss and gradient, and compares the bits of repeated runs. Then the processes take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import toml_data
from benchmarks.measure import builds, records, timing
from benchmarks.measure.correctness import Limits, Oracle, admit, guarded
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.workload import Workload, parse_all

SHAPES = {"cpu": ["1x4x64x16x8"], "cuda": ["v2-base:32x512"]}
_CHECKED_PAIRS = 10**9  # many processes check their results at the same time


class Variant(NamedTuple):
    """A build in which the only match of a regular expression in a file is replaced. The default: unchanged."""

    name: str
    provider: str
    file: str = ""
    pattern: str = ""
    text: str = ""

    def build(self, root: Path) -> None:
        """Makes a source tree of the variant, with its libraries."""
        builds.copy_sources(root)
        builds.link_benchmarks(root)
        if self.file:
            file = root / self.file
            changed, count = re.subn(self.pattern, self.text, file.read_text(encoding="utf-8"))
            if count != 1:
                raise ValueError(f"variant {self.name!r}: {self.file} has {count} matches of {self.pattern!r}, not 1")
            file.write_text(changed, encoding="utf-8")
        for library in (builds.ROOT / "minilm_kernels").glob("*.so"):
            shutil.copy2(library, root / "minilm_kernels")
        if self.file.startswith("csrc/"):  # host and device share constants
            command = [sys.executable, "build_support/native.py", self.provider]
            builds.call(command, f"building variant {self.name!r}", cwd=root)


def load() -> list[Variant]:
    return [Variant(**each) for each in toml_data.load(builds.ROOT / "benchmarks/plans/variants.toml")["variant"]]


class _Worker:
    """The process of a variant."""

    def __init__(self, variant: Variant, root: Path) -> None:
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {
            **{"PYTHONPATH": path, "MINILM_KERNELS_REVISION": records.revision()},
            **{"MINILM_KERNELS_CACHE": str(root / "cache"), "TRITON_CACHE_DIR": str(root / "cache/triton")},
        }
        command = [sys.executable, "-m", __name__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.variant = variant
        self._process = subprocess.Popen(command, cwd=root, env=environment, **pipes)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the end of the process is reported below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of variant {self.variant.name!r} ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    variants = [v for v in load() if v.provider in options.providers and v.name in (options.variants or [v.name])]
    if not variants:
        raise ValueError(f"--variants: expected some of {', '.join(v.name for v in load())}, got {options.variants}")
    shapes = options.shapes or SHAPES[options.device]
    workloads = parse_all(shapes, options.masks, options.dtypes, options.relations, options.device)
    processors = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(len(variants), processors)) as pool:
        trial: dict[str, records.Record] = {v.name: _record(v, workloads[0], "full") for v in variants}
        roots = {v.name: Path(folder, str(number)) for number, v in enumerate(variants)}
        built = pool.map(lambda v: guarded(trial[v.name], lambda: (v.build(roots[v.name]), True)[1]), variants)
        usable = [v for v, done in zip(variants, built, strict=True) if done]
        yield from (trial[v.name] for v in variants if v not in usable)
        workers = [_Worker(v, roots[v.name]) for v in usable]
        try:
            for workload in workloads:
                for mode in options.modes:
                    yield from _measure(workload, mode, workers, options, pool)
        finally:
            for worker in workers:
                worker.close()


def _measure(
    workload: Workload, mode: str, workers: Sequence[_Worker], options: argparse.Namespace, pool: ThreadPoolExecutor
) -> Iterator[records.Record]:
    def prepare(worker: _Worker) -> records.Record:
        record = _record(worker.variant, workload, mode)
        request = {"workload": asdict(workload), "record": record}
        limits = {"repeat": options.repeat, "memory": options.memory, "timeout": options.timeout}
        return guarded(record, lambda: worker.ask(**request, **limits)) or record

    found = list(pool.map(prepare, workers))
    ready = {
        n: worker for n, (worker, record) in enumerate(zip(workers, found, strict=True)) if record["status"] == "ok"
    }
    if options.repeat_only:
        yield from found
        return
    times = timing.interleaved(ready, workload.device, options.seconds, _turn)
    clocks = records.clocks(workload.device)
    for n in ready:
        found[n] |= timing.summary(times[n], workload.device) | {"clocks": clocks}
    yield from found


def _record(variant: Variant, workload: Workload, mode: str) -> records.Record:
    detail = {"variant": variant.name}
    return records.new("variants", variant.provider, workload, mode, pairs=workload.pairs, detail=detail)


def _turn(worker: _Worker, device: str, runs: int) -> list[float]:
    return worker.ask(runs=runs, device=device)


def _serve() -> None:
    """Answers the requests of `_Worker.ask`, one JSON line each. Other output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loss: TimedLoss | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "runs" in request:
            assert loss is not None
            loss()  # the GPU has computed for other processes
            answer: Any = timing.turn(loss, request["device"], request["runs"])
        else:
            loss = None  # free its memory
            answer, loss = _prepared(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _prepared(request: Mapping[str, Any]) -> tuple[records.Record, TimedLoss | None]:
    """The record of the requested workload, and the loss if it is right and repeated runs have equal bits."""
    record, workload = request["record"], Workload(**request["workload"])
    inputs = workload.inputs()
    count = timing.copies_beyond_cache(inputs.bytes(), workload.device)
    copies = [inputs, *(workload.inputs(seed) for seed in range(1, count))]
    oracle = Oracle(inputs, workload.pairs, workload.device, _CHECKED_PAIRS)
    loss = admit(record, workload, copies, oracle, Limits(request["memory"], request["timeout"]))
    if loss is None:
        return record, None
    alone = TimedLoss(loss.loss, [inputs], loss.mode)
    different = guarded(record, partial(_different_runs, alone, request["repeat"]))
    if different is None:
        return record, None
    record["detail"] |= {"repeated": request["repeat"], "different": different}
    if different:
        reason = f"{different} of {request['repeat']} repeated runs have other bits"
        return record | {"status": "wrong", "reason": reason}, None
    return record | {"status": "ok"}, loss


def _different_runs(loss: TimedLoss, runs: int) -> int:
    """The number of runs that do not repeat the bits of the first one."""
    value, grads = loss()
    different = 0
    for _ in range(runs):
        again, again_grads = loss()
        same = torch.equal(again, value) and all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))
        different += not same
    return different


if __name__ == "__main__":
    _serve()
