"""Metrics in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minilm_kernels.distill import DistillConfig, distill, trackers
from minilm_kernels.distill.trackers import Trackers


class Recorder:
    """Stands in for a tracker."""

    def __init__(self, folder: Path, config: DistillConfig, step: int) -> None:
        self.began, self.lines, self.closed = step, [], False
        RECORDERS.append(self)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.append((step, values))

    def close(self) -> None:
        self.closed = True


RECORDERS: list[Recorder] = []


@pytest.fixture(autouse=True)
def _recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    RECORDERS.clear()
    monkeypatch.setattr(trackers, "_KINDS", {"tensorboard": Recorder, "wandb": Recorder})


def test_trackers_get_the_numbers_of_metrics_jsonl(settings: Callable[..., DistillConfig]) -> None:
    result = distill(settings(max_steps=3, report_to=("tensorboard", "wandb")))
    one, other = RECORDERS
    assert one.closed
    assert one.lines == other.lines
    records = list(map(json.loads, result.metrics.read_text(encoding="utf-8").splitlines()))
    assert [step for step, _ in one.lines] == [record["step"] for record in records]
    assert one.lines[0][1]["eval/loss"] == records[0]["eval_loss"]
    assert one.lines[1][1]["train/loss"] == records[1]["loss"]
    assert "train/learning_rate" in one.lines[1][1]


def test_a_tracker_that_fails_does_not_end_the_run(
    settings: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Recorder, step: int, values: dict[str, float]) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(Recorder, "log", broken)
    assert distill(settings(max_steps=2, report_to=("wandb",))).step == 2
    assert capsys.readouterr().err.count("--report-to wandb: it failed, and gets no more metrics: no network") == 1


def test_a_tracker_that_does_not_start_is_an_error(
    settings: Callable[..., DistillConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> None:
        raise ValueError("no account")

    monkeypatch.setattr(trackers, "_KINDS", {"wandb": refused})
    with pytest.raises(RuntimeError, match="--report-to wandb: it does not start: no account"):
        Trackers(tmp_path, settings(report_to=("wandb",)), 0)


def test_unknown_trackers_are_refused(settings: Callable[..., DistillConfig]) -> None:
    with pytest.raises(ValueError, match="--report-to must be one of tensorboard, wandb, got 'mlflow'"):
        settings(report_to=("wandb", "mlflow"))


def test_a_resumed_run_continues_the_wandb_run(
    settings: Callable[..., DistillConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    ids = iter(("one", "two"))

    def init(**options: Any) -> SimpleNamespace:
        begun.append(options)
        return SimpleNamespace(id=options["id"] or next(ids))

    fake = SimpleNamespace(init=init)
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    for step in (0, 5, 0):
        trackers._WandB(tmp_path, settings(), step)
    assert [options["id"] for options in begun] == [None, "one", None]
    assert str(tmp_path.parent) not in json.dumps(begun[0]["config"])
