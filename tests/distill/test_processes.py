"""Real processes: a kill -9, torchrun with two gloo processes, signals, and an error on one of several ranks."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minilm_kernels.distill import DistillConfig, distill, processes, stopping
from minilm_kernels.distill.report import read_metrics

Settings = Callable[..., DistillConfig]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PATIENCE = 120.0


@contextlib.contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, with its output, that does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # torchrun's workers are sessions of their own, and hold the pipe that is read below.
        for group in (process.pid, *children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)


def children(parent: int) -> list[int]:
    """The processes below one, by /proc."""
    with contextlib.suppress(OSError):
        below = [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        return [*below, *(deeper for child in below for deeper in children(child))]
    return []


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """Waits until the run in `process` has written the metrics of `step`."""
    deadline = time.monotonic() + PATIENCE
    while not any(record["step"] >= step for record in read_metrics(metrics)):
        assert process.poll() is None, process.communicate(timeout=PATIENCE)[0]
        assert time.monotonic() < deadline, "the run does not advance"
        time.sleep(0.005)


def options(config: DistillConfig) -> list[str]:
    return shlex.split(config.command())[1:]


def test_a_run_killed_at_a_random_step_continues_to_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    """300 steps; kill -9 at a random moment, checkpoints often enough that some kills meet one being written."""
    changes: dict[str, Any] = {
        "steps": 300,
        "seq_len": 16,
        "batch_size": 2,
        "relation_heads": 2,
        "heldout_rows": 4,
        "shuffle_rows": 20,
        "eval_every": 100,
        "checkpoint_every": 5,
    }
    whole = distill(settings(output=tmp_path / "whole", **changes))
    assert whole.student is not None

    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moment: {seed}")
    chance = random.Random(seed)
    config = settings(**changes)
    with started("-m", "minilm_kernels.distill", *options(config)) as process:
        wait_for_step(process, tmp_path / "run" / "metrics.jsonl", chance.randint(1, 250))
        time.sleep(chance.random() * 0.2)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert not (tmp_path / "run" / "student").exists()

    continued = distill(settings(**changes, resume=True))
    assert continued.student is not None
    files = {path.name for path in whole.student.iterdir()}
    assert files == {path.name for path in continued.student.iterdir()}
    assert (continued.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()
    losses = [
        [(record["step"], record["split"], record["loss"]) for record in read_metrics(result.metrics)]
        for result in (whole, continued)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 300 + 4
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".unfinished")]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(settings: Settings, tmp_path: Path) -> None:
    """Also: a signal to torchrun stops both after the same step, and both continue."""
    changes: dict[str, Any] = {"steps": 40, "dropout": 0.0, "accumulation": 2, "checkpoint_every": 100, "lr": 3e-4}
    one = distill(settings(output=tmp_path / "one", **changes))
    config = settings(**changes)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "minilm_kernels.distill"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(*torchrun, *options(config)) as process:
        wait_for_step(process, metrics, 2)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[0]
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped at step {stopped}; continue with\n  torchrun --nproc-per-node 2" in said
    with pytest.raises(ValueError, match="processes: 2 before, 1 now"):
        distill(settings(**changes, resume=True))
    with started(*torchrun, *options(config), "--resume") as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said

    lines = [read_metrics(path) for path in (one.metrics, metrics)]
    assert [(r["step"], r["split"]) for r in lines[0]] == [(r["step"], r["split"]) for r in lines[1]]
    for single, double in zip(*lines, strict=True):
        assert double["tokens"] == single["tokens"]
        for name in ("loss", "qq", "kk", "vv", *(["grad_norm"] if "grad_norm" in single else [])):
            assert double[name] == pytest.approx(single[name], rel=2e-5), (single, double)
    assert one.student is not None
    models = [load_file(path / "model.safetensors") for path in (one.student, tmp_path / "run" / "student")]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert (tensor - models[1][name]).abs().max() < 2e-4, name


def alone(module: Any, code: str) -> list[str]:
    """A command that runs `code` with the names of one module, without the seconds that the package takes to import."""
    return ["-c", f"import runpy\nglobals().update(runpy.run_path({module.__file__!r}))\n{code}"]


def test_an_error_on_the_main_process_ends_all() -> None:
    code = """
def fail():
    raise ValueError("no room")
with Processes("cpu") as together:
    together.on_main(lambda: None)
    print(f"rank {together.rank} began", flush=True)
    together.on_main(fail)
    print("went on", flush=True)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = alone(processes, code)
    with started(*command, RANK="0", **common) as first, started(*command, RANK="1", **common) as second:
        said = [process.communicate(timeout=PATIENCE)[0] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [1, 1]
    assert "ValueError: no room" in said[0]
    assert "RuntimeError: the main process failed" in said[1]
    assert all("began" in text and "went on" not in text for text in said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_aborts_at_once(number: signal.Signals) -> None:
    code = """
import time
with StopSignals() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("asked", signals.received, flush=True)
    time.sleep(600)
"""
    with started(*alone(stopping, code)) as process:
        assert process.stdout is not None
        read = process.stdout.readline
        assert read() == "ready\n"
        process.send_signal(number)
        assert [read() for _ in range(3)][1:] == [
            "minilm-distill: stopping after this step; the same signal again aborts at once\n",
            f"asked {number.value}\n",
        ]
        process.send_signal(number)
        assert process.wait(PATIENCE) == -number


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with stopping.StopSignals():
        assert [signal.getsignal(number) for number in stopping.SIGNALS] != before
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
