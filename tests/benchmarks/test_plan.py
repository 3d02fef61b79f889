"""A plan keeps its budget, its partial results and its summary of sixty lines."""

import json
import shlex
import time

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import plan, run
from tests.benchmarks.test_report import ALL, made


def write(file, count):
    """A command that writes records as the process of a stage does."""
    text = "".join(json.dumps(record) + "\n" for record in ALL[:count])
    return f"printf %s {shlex.quote(text)} >> {file}"


def test_a_stopped_stage_keeps_its_records_and_the_others_run(tmp_path, monkeypatch, capfd):
    def stage(name, share, *commands):
        return plan.Stage(name, "", share, [f"sh -c {shlex.quote(command)}" for command in commands])

    slow, broken, good = (tmp_path / f"cpu-{name}.jsonl" for name in ("slow", "broken", "good"))
    stages = [
        stage("slow", 1, f"{write(slow, 3)}; sleep 98 & sleep 99"),
        stage("broken", 5, "echo no such thing; exit 3", write(broken, 1)),
        stage("good", 5, write(good, 2)),
    ]
    settings = {"minutes": 1.0, "out": "unused"}
    monkeypatch.setattr(plan, "load", lambda device: (settings, stages))
    begin = time.monotonic()
    assert main(["cpu", "--minutes", "0.4", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 24
    out = capfd.readouterr().out
    assert "6 records" in out.splitlines()[0]
    assert "slow       stopped after its 2 s; 3 records kept" in out
    assert "broken     failed; 1 records" in out
    assert "| no such thing" in out
    assert "good       done" in out


def test_the_gpu_plan_is_printed_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--minutes", "20", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "no CUDA device here" in text
    order = [text.index(f" {stage}: ") for stage in ("build", "tests", "accuracy", "loss", "memory", "step")]
    assert order == sorted(order)
    assert sum(float(line.split()[0]) for line in text.splitlines() if " min  " in line) == pytest.approx(20, abs=0.5)
    assert not (tmp_path / "out").exists()


def test_the_parser_accepts_the_commands_of_the_plans(monkeypatch):
    """Every `run` of both plans parses, so that misspelt options are found before a run on an expensive machine."""
    parsed = []
    monkeypatch.setattr(run, "main", lambda options: parsed.append(options))
    for device in ("cpu", "gpu"):
        for stage in plan.load(device)[1]:
            for command in stage.commands:
                if command.startswith("run"):
                    main(shlex.split(command))
    assert {options.suite for options in parsed} == {"loss", "memory", "step", "inference", "accuracy"}


def test_the_summary_has_sixty_lines_and_problems_first():
    wrong = made("loss", "cuda", status="wrong", reason="relative error 1e+00")
    text = plan.summary(["loss done"], [*ALL * 20, *[wrong] * 30], 3.0).splitlines()
    assert len(text) == 60
    assert text[2].startswith("WRONG: loss cuda")
    assert text[-1].startswith("... and ")
    assert len(plan.summary([], [], 0.1).splitlines()) == 1


def test_disturbed_records_are_counted(tmp_path):
    quiet, busy = (made("loss", "cpu", clocks={"mhz": 3000, "load": load}) for load in (0.4, 99.0))
    assert "DISTURBED: 1 of" in plan.summary([], [quiet, busy], 1.0)


def test_bad_minutes(capsys):
    with pytest.raises(SystemExit):
        main(["cpu", "--minutes", "0"])
    assert "--minutes" in capsys.readouterr().err
