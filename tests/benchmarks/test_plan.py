"""A plan keeps its budget, its partial results and its summary of sixty lines."""

import json
import shlex
import time

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import plan, run
from benchmarks.measure.workload import parse_all
from benchmarks.suites import SUITES, variants
from tests.benchmarks.test_report import ALL, made


def write(file, count):
    """A command that writes records as the process of a step does."""
    text = "".join(json.dumps(record) + "\n" for record in ALL[:count])
    return f"printf %s {shlex.quote(text)} >> {file}"


def test_a_stopped_step_keeps_its_records_and_the_others_run(tmp_path, monkeypatch, capfd):
    def step(name, seconds, *commands):
        return plan.Step(name, "", seconds, [f"sh -c {shlex.quote(command)}" for command in commands])

    slow, broken, good = (tmp_path / f"cpu-{name}.jsonl" for name in ("slow", "broken", "good"))
    steps = [
        step("slow", 1, f"{write(slow, 3)}; sleep 98 & sleep 99"),
        step("broken", 9, "echo no such thing; exit 3", write(broken, 1)),
        step("good", 10, write(good, 2)),
    ]
    monkeypatch.setattr(plan, "load", lambda device: plan.Plan(1.0, "unused", steps))
    begin = time.monotonic()
    assert main(["cpu", "--minutes", "1", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - begin < 60
    out = capfd.readouterr().out
    assert "6 records" in out.splitlines()[0]
    assert "slow           stopped after its 3 s; 3 records kept" in out
    assert "broken         failed; 1 records" in out
    assert "| no such thing" in out
    assert "good           done" in out


def test_the_gpu_plan_is_printed_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--minutes", "20", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "no CUDA device here" in text
    steps = ("correctness build", "correctness device-tests", "speed variants", "speed loss", "record train_step")
    order = [text.index(f" {step}: ") for step in steps]
    assert order == sorted(order)
    minutes = [float(line.split()[0]) for line in text.splitlines() if " min  " in line]
    assert sum(minutes) == pytest.approx(3 * 20, abs=1.0)
    assert not (tmp_path / "out").exists()


def test_the_parser_accepts_the_commands_of_the_plans(monkeypatch):
    """Every `run` of both plans parses, so that misspelt options are found before a run on an expensive machine.

    The suites parse shapes and masks themselves; the names of variants and of shapes are tried here.
    """
    parsed = []
    monkeypatch.setattr(run, "main", lambda options: parsed.append(options))
    for device in ("cpu", "gpu"):
        for command in [command for step in plan.load(device).steps for command in step.commands]:
            words = shlex.split(command)
            if "run" in words:
                main(words[words.index("run") :])
    assert {options.suite for options in parsed} == set(SUITES)
    names = {variant.name for variant in variants.load()}
    for options in parsed:
        assert set(options.variants or ()) <= names
        if options.suite not in ("train_step", "data", "inference"):
            shapes = [shape for shape in options.shapes or () if shape != "none"]
            parse_all(shapes, options.masks, options.dtypes, options.relations, "cpu")


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
