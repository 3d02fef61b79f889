"""The scripts for several machines, which are emulated on this one."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minilm_kernels.distill import DistillConfig, distill
from minilm_kernels.distill.metrics import read_metrics
from tests.distill.tiny import make_texts, save_model
from tests.processes import PATIENCE, children, wait_for_step

EXAMPLES = Path(__file__).parents[2] / "examples"
Settings = Callable[..., DistillConfig]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a run with two samples a step, of which each of two processes gets one."""
    save_model(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(200)), encoding="utf-8")

    def make(name: str, **changes: object) -> DistillConfig:
        sizes = {"student_num_hidden_layers": 1, "student_hidden_size": 24, "student_num_attention_heads": 4}
        often = {"logging_steps": 1, "save_steps": 5, "eval_steps": 50, "eval_samples": 4}
        given = {"teacher": tmp_path / "teacher", "text": [tmp_path / "text.txt"], "output_dir": tmp_path / name}
        return DistillConfig(
            **{**given, **sizes, **often, "relation_heads": 12, "max_seq_length": 32, "total_batch_size": 2},
            **{"max_steps": 150, "dropout": 0.1, "device": "cpu", **changes},
        )

    return make


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder with the commands `torchrun` and `minilm-distill` of this interpreter, for PATH.

    Before step 140, runs wait for a signal or for the file `released`.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    code = f"import pathlib, tests.distill.held as held\nheld.main(140, pathlib.Path({str(tmp_path / 'released')!r}))"
    (folder / "held.py").write_text(code, encoding="utf-8")
    words = '"${@/#minilm_kernels.distill/held}"'
    command(folder / "torchrun", f'exec "{sys.executable}" -m torch.distributed.run {words}')
    command(folder / "minilm-distill", f'exec "{sys.executable}" -m held "$@"')
    return folder


def command(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def options(config: DistillConfig) -> list[str]:
    return shlex.split(config.command())[1:]


@contextlib.contextmanager
def started(path: Path, arguments: list[str], bin: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a script, and kills it and its children at the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), str(bin), *filter(None, sys.path)])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([str(path), *arguments], env=environment, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        for child in (process.pid, *children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)


def free_port() -> int:
    """A port that no process listens on, below those that the system gives to other connections meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def check_equal(run: Path, whole: Path) -> None:
    found, expected = (load_file(folder / "student" / "model.safetensors") for folder in (run, whole))
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    losses = [
        [(record["step"], record["loss"]) for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
        for folder in (run, whole)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the workers are found in /proc")
def test_torchrun_on_two_machines_goes_on_after_a_killed_process(
    settings: Settings, commands: Path, tmp_path: Path
) -> None:
    """The main process, which has locked the folder, or the other one is killed with SIGKILL at a random step."""
    distill(settings("whole", micro_batch_size=1))
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moment: {seed}")
    chance = random.Random(seed)
    script, words = EXAMPLES / "torchrun.sh", options(settings("run"))
    variables = {"NODES": "2", "GPUS": "1", "HEAD": f"127.0.0.1:{free_port()}", "RESTARTS": "3"}
    with (
        started(script, words, commands, **variables) as first,
        started(script, words, commands, **variables) as second,
    ):
        wait_for_step(tmp_path / "run" / "metrics.jsonl", chance.randint(1, 120), first, second)
        [worker] = children(chance.choice([first, second]).pid)
        os.kill(worker, signal.SIGKILL)
        (tmp_path / "released").touch()
        said = [process.communicate(timeout=PATIENCE)[0] for process in (first, second)]
        assert [process.returncode for process in (first, second)] == [0, 0], said
    assert any(word in "".join(said) for word in ("continuing after step", "starting from the beginning")), said
    check_equal(tmp_path / "run", tmp_path / "whole")


SRUN = """
# Starts SLURM_NTASKS tasks on emulated nodes, and ends with the highest status of a task.
[ "$1" = --wait=60 ] || exit 2
shift
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" & tasks="${tasks:-} $!"
done
status=0
for task in $tasks; do
    wait "$task" || { code=$?; status=$((code > status ? code : status)); }
done
exit $status
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the tasks are found in /proc")
def test_the_slurm_job_is_queued_again_and_continues(settings: Settings, commands: Path, tmp_path: Path) -> None:
    """SLURM sends SIGUSR1 to the tasks before the time limit. The second job has one task."""
    distill(settings("whole", micro_batch_size=1))
    command(commands / "srun", SRUN)
    requeued = tmp_path / "requeued"
    command(commands / "scontrol", f'[ "$1" = requeue ] && echo "$2" > {requeued} || printf "127.0.0.1\\nother\\n"')
    script, words = EXAMPLES / "slurm.sh", options(settings("run", micro_batch_size=1))
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "nodes", "SLURM_CPUS_PER_TASK": "1"}
    two = {**job, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    with started(script, words, commands, **two) as process:
        wait_for_step(tmp_path / "run" / "metrics.jsonl", 20, process)
        for child in children(process.pid):
            if b"\0held\0" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGUSR1)
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + signal.SIGUSR1, said
    assert requeued.read_text().split() == [job["SLURM_JOB_ID"]]
    requeued.unlink()
    (tmp_path / "released").touch()
    one = {**job, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    with started(script, words, commands, **one) as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    assert "continuing after step" in said
    assert not requeued.exists()
    check_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_accelerate_launches_the_command(settings: Settings, commands: Path, tmp_path: Path) -> None:
    distill(settings("whole", micro_batch_size=1, max_steps=10))
    command(commands / "accelerate", f'exec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"')
    launch = f"launch --multi_gpu --num_processes 2 --main_process_port {free_port()} -m minilm_kernels.distill"
    with started(
        commands / "accelerate", [*launch.split(), *options(settings("run", max_steps=10))], commands
    ) as process:
        said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, said
    check_equal(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sh", "ray_train.py", "accelerate_loop.py"])
def test_an_engine_takes_at_most_forty_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40


def test_scripts_are_valid_shell() -> None:
    for script in sorted(EXAMPLES.glob("*.sh")):
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
