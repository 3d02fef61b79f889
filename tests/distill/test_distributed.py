"""Tests with real processes: kill -9, torchrun with two gloo processes, signals, and errors on one rank."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from minilm_kernels.distill import DistillConfig, distill, distributed, signals
from minilm_kernels.distill import distributed as processes
from minilm_kernels.distill.metrics import read_metrics
from tests.processes import PATIENCE, children, wait_for_step

Settings = Callable[..., DistillConfig]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@contextlib.contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process, and kills it and its children at the end of the test."""
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
        # The workers of torchrun have their own sessions, and they keep open the pipe that is read below.
        for group in (process.pid, *children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)


def options(config: DistillConfig) -> list[str]:
    return shlex.split(config.command())[1:]


def held(step: int) -> list[str]:
    """`minilm-distill` that waits for a signal after some steps."""
    return ["-c", f"from tests.distill.held import main; main({step})"]


def held_script(folder: Path, step: int) -> list[str]:
    """The same as a script, for torchrun."""
    script = folder / "held.py"
    script.write_text(held(step)[1], encoding="utf-8")
    return [str(script)]


def test_a_run_killed_at_a_random_step_continues_to_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    """Kills a run of 300 steps at a random moment, with so many checkpoints that some kills interrupt one.

    It waits before the last step, so that it never ends by itself.
    """
    changes: dict[str, Any] = {
        "max_steps": 300,
        "max_seq_length": 16,
        "total_batch_size": 2,
        "relation_heads": 2,
        "eval_samples": 4,
        "eval_steps": 100,
        "save_steps": 5,
    }
    whole = distill(settings(output_dir=tmp_path / "whole", **changes))
    assert whole.student is not None

    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moment: {seed}")
    chance = random.Random(seed)
    config = settings(**changes)
    with started(*held(299), *options(config)) as process:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", chance.randint(1, 299), process)
        time.sleep(chance.random() * 0.2)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert not (tmp_path / "run" / "student").exists()

    continued = distill(settings(**changes, resume_from_checkpoint=True))
    assert continued.student is not None
    files = {path.name for path in whole.student.iterdir()}
    assert files == {path.name for path in continued.student.iterdir()}
    assert (continued.student / "model.safetensors").read_bytes() == (whole.student / "model.safetensors").read_bytes()
    losses = [
        [
            (record["step"], record["split"], record.get("loss", record.get("eval_loss")))
            for record in read_metrics(result.metrics)
        ]
        for result in (whole, continued)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 300 + 4
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".unfinished")]


@pytest.mark.slow
def test_a_chain_killed_in_every_stage_continues_to_the_same_bits(settings: Settings, tmp_path: Path) -> None:
    """Kills one run at random moments of the assistant, of the change of stages, of the student, and of its end."""
    changes: dict[str, Any] = {
        "teacher_assistant": "2x36",
        "max_steps": 150,
        "dropout": 0.1,
        "max_seq_length": 16,
        "total_batch_size": 2,
        "eval_samples": 4,
        "eval_steps": 50,
        "save_steps": 5,
    }
    distill(settings(output_dir=tmp_path / "whole", **changes))
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")
    chance = random.Random(seed)
    config = settings(**changes)
    first, last = tmp_path / "run" / "assistant-1" / "metrics.jsonl", tmp_path / "run" / "metrics.jsonl"
    moments = [(first, chance.randint(1, 120)), (first, 150), (last, chance.randint(1, 60)), (last, 100), (last, 150)]
    for number, (metrics, step) in enumerate(moments):
        resume = ["--resume-from-checkpoint"] if number else []
        with started("-m", "minilm_kernels.distill", *options(config), *resume) as process:
            wait_for_step(metrics, step, process)
            time.sleep(chance.random() * 0.3)
            process.kill()
            assert process.wait(PATIENCE) in (-signal.SIGKILL, 0)
    distill(settings(**changes, resume_from_checkpoint=True))
    for folder in ("assistant-1", "."):
        runs = [tmp_path / name / folder for name in ("run", "whole")]
        one, other = ((run / "student" / "model.safetensors").read_bytes() for run in runs)
        assert one == other
        losses = [
            [(record["step"], record.get("loss", record.get("eval_loss"))) for record in read_metrics(path)]
            for path in (run / "metrics.jsonl" for run in runs)
        ]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 150 + 4
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".unfinished")]


@pytest.mark.slow
def test_a_chain_of_two_processes_is_that_of_one(settings: Settings, tmp_path: Path) -> None:
    """A signal to torchrun stops both processes in the assistant's stage, and both continue through both stages."""
    changes: dict[str, Any] = {
        **{"teacher_assistant": "2x36", "max_steps": 20, "dropout": 0.0, "gradient_accumulation_steps": 2},
        **{"save_steps": 100, "learning_rate": 3e-4},
    }
    distill(settings(output_dir=tmp_path / "one", **changes))
    config = settings(**changes)
    with started(*TORCHRUN, *held_script(tmp_path, 10), *options(config)) as process:
        wait_for_step(tmp_path / "run" / "assistant-1" / "metrics.jsonl", 2, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[0]
    assert " of assistant-1; continue with\n  torchrun --nproc-per-node 2" in said
    assert not (tmp_path / "run" / "student").exists()
    with started(*TORCHRUN, "-m", "minilm_kernels.distill", *options(config), "--resume-from-checkpoint") as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    for folder in ("assistant-1", "."):
        one, two = (load_file(tmp_path / name / folder / "student" / "model.safetensors") for name in ("one", "run"))
        for name, tensor in one.items():
            assert (two[name] - tensor).abs().max() < 2e-4, name


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(settings: Settings, tmp_path: Path) -> None:
    """Two processes give the results of one. A signal to torchrun stops both after the same step; both can continue."""
    changes: dict[str, Any] = {
        "max_steps": 40,
        "dropout": 0.0,
        "gradient_accumulation_steps": 2,
        "save_steps": 100,
        "learning_rate": 3e-4,
    }
    one = distill(settings(output_dir=tmp_path / "one", **changes))
    config = settings(**changes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with started(*TORCHRUN, *held_script(tmp_path, 20), *options(config)) as process:
        wait_for_step(metrics, 2, process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[0]
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped at step {stopped}; continue with\n  torchrun --nproc-per-node 2" in said
    with started(*TORCHRUN, "-m", "minilm_kernels.distill", *options(config), "--resume-from-checkpoint") as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said

    lines = [read_metrics(path) for path in (one.metrics, metrics)]
    assert [(r["step"], r["split"]) for r in lines[0]] == [(r["step"], r["split"]) for r in lines[1]]
    for single, double in zip(*lines, strict=True):
        assert double["tokens"] == single["tokens"]
        prefix = "eval_" if single["split"] == "eval" else ""
        names = [prefix + name for name in ("loss", "qq", "kk", "vv")]
        for name in [*names, *(["grad_norm"] if "grad_norm" in single else [])]:
            assert double[name] == pytest.approx(single[name], rel=2e-5), (single, double)
    assert one.student is not None
    models = [load_file(path / "model.safetensors") for path in (one.student, tmp_path / "run" / "student")]
    assert models[0].keys() == models[1].keys()
    for name, tensor in models[0].items():
        assert (tensor - models[1][name]).abs().max() < 2e-4, name


def alone(module: Any, code: str) -> list[str]:
    """A command that runs `code` with the names of one module, without the package, whose import takes seconds."""
    return ["-c", f"import runpy\nglobals().update(runpy.run_path({module.__file__!r}))\n{code}"]


def two_ranks(*command: str) -> list[tuple[int, str]]:
    """Runs two processes in one group. Returns their exit statuses and outputs."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port, which it has already
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with started(*command, RANK="0", **common) as first, started(*command, RANK="1", **common) as second:
        said = [process.communicate(timeout=PATIENCE)[0] for process in (first, second)]
    return [(process.returncode, text) for process, text in zip((first, second), said, strict=True)]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_on_one_process_ends_all(failing: int) -> None:
    code = f"""
def fail():
    raise ValueError("no room")
def fail_on_one():
    if context.rank == {failing}:
        fail()
with DistContext("cpu") as context:
    assert context.on_main(lambda: f"from {{context.rank}}") == "from 0"
    assert context.on_all(lambda: context.rank) == context.rank
    context.check_equal("the same", "nothing")
    context.check_equal(None if context.rank else "known to one", "nothing")
    try:
        context.check_equal(context.rank, "their ranks")
    except RuntimeError as error:
        print(error, flush=True)
    if {failing}:
        context.on_all(fail_on_one)
    else:
        context.on_main(fail)
    print("went on", flush=True)
"""
    ends = two_ranks(*alone(distributed, code))
    assert [status for status, _ in ends] == [1, 1]
    assert all("the processes do not agree on their ranks: process 0: 0; process 1: 1" in said for _, said in ends)
    assert "ValueError: no room" in ends[failing][1]
    other = "process 1 failed: ValueError: no room" if failing else "the main process failed"
    assert f"RuntimeError: {other}" in ends[1 - failing][1]
    assert not any("went on" in said for _, said in ends)


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_ends_all(settings: Settings, tmp_path: Path) -> None:
    """No process continues from another step than the others, and none waits for them."""
    distill(settings())
    (tmp_path / "run" / "student").rename(tmp_path / "student")
    code = """
import errno, os, sys
from minilm_kernels.distill import cli, loop
def broken(folder):
    raise OSError(errno.EIO, "Input/output error")
if os.environ["RANK"] == "1":
    loop.read_checkpoint = broken
sys.exit(cli.main(sys.argv[1:]))
"""
    ends = two_ranks("-c", code, *options(settings()), "--resume-from-checkpoint")
    assert [status for status, _ in ends] == [1, 1], ends
    assert "error: process 1 failed: OSError: [Errno 5] Input/output error" in ends[0][1]
    assert "error: [Errno 5] Input/output error" in ends[1][1]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000000003", "step-000000006"]


@pytest.mark.parametrize(
    ("variables", "count", "rank"),
    [({}, 1, 0), ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, 1, 0), ({"WORLD_SIZE": "3", "RANK": "2"}, 3, 2)],
)
def test_a_missing_or_empty_variable_is_one_process(
    variables: dict[str, str], count: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = distributed.DistContext("cpu")
    assert (found.world_size, found.rank) == (count, rank)


def test_nothing_keeps_a_group_that_was_left() -> None:
    """A sharded model is a cycle that holds its group, with which the process must not end."""
    code = """
import gc, weakref
gc.disable()
class Model: pass
with DistContext("cpu") as context:
    model = Model()
    model.itself, model.group = model, dist.group.WORLD
    model = weakref.ref(model)
print(model(), context._control)
"""
    assert two_ranks(*alone(distributed, code)) == [(0, "None None\n")] * 2


def test_a_group_that_is_not_complete_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process ends while the groups are made. A process that ends with a group may abort."""
    calls: list[str] = []

    def fails(**options: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: calls.append(backend))
    monkeypatch.setattr(distributed.dist, "new_group", fails)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: calls.append("left"))
    with pytest.raises(RuntimeError, match="closed by peer"), distributed.DistContext("cpu"):
        pass
    assert calls == ["gloo", "left"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a whole number"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is -1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
    ],
)
def test_variables_that_do_not_fit_are_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"environment: .*{message}"):
        distributed.DistContext("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_end_with_a_killed_launcher() -> None:
    """The worker receives a SIGTERM, so that the run stops after its step."""
    worker = f"""
import runpy, signal, time
signal.signal(signal.SIGTERM, lambda number, frame: (print("asked to stop", flush=True), exit(0)))
with runpy.run_path({processes.__file__!r})["DistContext"]("cpu"):
    print("ready", flush=True)
    time.sleep(600)
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    with started("-c", launcher, TORCHELASTIC_RUN_ID="none") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.communicate(timeout=PATIENCE)[0] == "asked to stop\n"


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(settings: Settings, tmp_path: Path) -> None:
    """`minilm-distill ... 2>&1 | head -c 1`"""
    command = shlex.join([sys.executable, "-m", "minilm_kernels.distill", *options(settings())])
    piped = f"({command}; echo $? > {tmp_path}/status) 2>&1 | head -c 1"
    with started("-c", f"import os; os.execvp('sh', ['sh', '-c', {piped!r}])") as process:
        process.communicate(timeout=PATIENCE)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
    assert (tmp_path / "status").read_text() == "0\n"


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
    with started(*alone(signals, code)) as process:
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


def test_torchruns_echo_does_not_abort() -> None:
    """The terminal sends SIGINT to all processes, and torchrun forwards it, so that workers receive it twice."""
    code = """
import time
now = 0.0
time.monotonic = lambda: now
with StopSignals() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    now = ECHO_SECONDS - 0.01
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on", signals.received, flush=True)
    now = ECHO_SECONDS
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
"""
    with started(*alone(signals, code), TORCHELASTIC_RUN_ID="none") as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert said.splitlines()[-1] == "goes on 2"
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_signals_that_come_again_by_themselves_never_abort(number: signal.Signals) -> None:
    code = f"""
with StopSignals() as signals:
    for another in (3 * [{number.value}]) + [signal.SIGTERM]:  # SIGTERM is another signal than the first
        os.kill(os.getpid(), another)
    print("goes on", signals.received, flush=True)
"""
    with started(*alone(signals, code)) as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert said.splitlines() == ["", "minilm-distill: stopping after this step", f"goes on {number.value}"]


def test_what_is_ignored_or_used_by_others_stays_so() -> None:
    """nohup ignores SIGHUP; a program may have a handler for SIGUSR1."""
    calls: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR1, lambda n, _: calls.append(n))
    try:
        with signals.StopSignals() as stop:
            for number in (signal.SIGHUP, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            assert stop.received == 0
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR1, before[1])
    assert calls == [signal.SIGUSR1]


def test_a_signal_without_standard_error_writes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If standard error is closed at the start, the next file that is opened, such as a checkpoint, gets number 2."""

    def write(handle: int, content: bytes) -> int:
        raise BrokenPipeError

    with signals.StopSignals() as stop:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    file = tmp_path / "file"
    code = f"""
with open({str(file)!r}, "w") as file, StopSignals() as signals:
    print(file.fileno(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print(signals.received, flush=True)
"""
    closing = shlex.join([sys.executable, *alone(signals, code)]) + " 2>&-"
    with started("-c", f"import os; os.execvp('sh', ['sh', '-c', {closing!r}])") as process:
        assert process.communicate(timeout=PATIENCE)[0].split() == ["2", "15"]
    assert file.read_bytes() == b""


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.StopSignals():
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
