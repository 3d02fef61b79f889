"""`--load-best-model-at-end`, and checkpoints that can be loaded as students."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from minilm_kernels.distill import DistillConfig, distill, evaluation, loop

LOSSES = [5.0, 3.0, 2.0, 4.0, 2.0]  # at steps 0, 1, 2, ...; the lowest one occurs twice


@pytest.fixture
def given_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Replaces the evaluation loss by given ones, by the number of the evaluation."""

    def give(losses: list[float]) -> None:
        left = iter(losses)

        def measured(*arguments: Any) -> dict[str, float]:
            found = evaluation.evaluate(*arguments)
            assert found is not None
            return {**found, "eval_loss": next(left)}

        monkeypatch.setattr(loop, "evaluate", measured)

    return give


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_student_has_the_weights_of_the_lowest_loss(
    settings: Callable[..., DistillConfig], given_losses: Callable[[list[float]], None], tmp_path: Path
) -> None:
    given_losses(LOSSES)
    config = settings(max_steps=4, eval_steps=1, save_steps=100, save_total_limit=1, load_best_model_at_end=True)
    result = distill(config)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000002", "step-000000004"]
    best, last = (weights(folder / f"step-00000000{step}") for step in (2, 4))
    assert not equal(best, last)
    assert result.student is not None
    assert equal(weights(result.student), best)
    assert result.eval_after is not None
    assert (result.eval_after["step"], result.eval_after["eval_loss"]) == (2, 2.0)
    assert "The weights are those of step 2" in (result.student / "README.md").read_text(encoding="utf-8")
    assert distill(replace(config, resume_from_checkpoint=True)).eval_after == result.eval_after


def test_a_stopped_run_remembers_its_best_step(
    settings: Callable[..., DistillConfig],
    given_losses: Callable[[list[float]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"max_steps": 4, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}
    given_losses(LOSSES)
    whole = distill(settings(**options, output_dir=str(tmp_path / "whole")))
    given_losses(LOSSES)
    step = loop.TrainingLoop._step

    def killed(self: loop.TrainingLoop) -> None:
        if self.state.step == 3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(loop.TrainingLoop, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(settings(**options))
    monkeypatch.setattr(loop.TrainingLoop, "_step", step)
    given_losses(LOSSES[4:])
    resumed = distill(settings(**options, resume_from_checkpoint=True))
    assert resumed.eval_after == whole.eval_after
    assert equal(weights(resumed.student), weights(whole.student))


def test_a_damaged_best_checkpoint_costs_the_choice_and_not_the_student(
    settings: Callable[..., DistillConfig],
    given_losses: Callable[[list[float]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given_losses([5.0, 1.0, 2.0])
    write = loop.TrainingLoop.write_student

    def after_damage(self: loop.TrainingLoop, target: Path, weights: Any) -> None:
        (tmp_path / "run" / "checkpoints" / "step-000000001" / "model.safetensors").write_bytes(b"")
        write(self, target, weights)

    monkeypatch.setattr(loop.TrainingLoop, "write_student", after_damage)
    result = distill(settings(max_steps=2, eval_steps=1, load_best_model_at_end=True))
    assert equal(weights(result.student), weights(tmp_path / "run" / "checkpoints" / "step-000000002"))
    assert "--load-best-model-at-end: checkpoint" in capsys.readouterr().err


def test_it_needs_evaluations(settings: Callable[..., DistillConfig]) -> None:
    with pytest.raises(ValueError, match="--load-best-model-at-end needs evaluations"):
        settings(eval_fraction=0.0, load_best_model_at_end=True)


def test_every_checkpoint_is_a_student_with_its_tokenizer(
    settings: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    result = distill(settings(max_steps=2, save_steps=1))
    last = tmp_path / "run" / "checkpoints" / "step-000000002"
    assert equal(weights(last), weights(result.student))
    words = "w1 w2 w59"
    assert AutoTokenizer.from_pretrained(last)(words) == AutoTokenizer.from_pretrained(result.student)(words)


def test_published_settings_name_no_folder_of_this_machine(
    settings: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    result = distill(settings(max_steps=1))
    for name in ("settings.json", "README.md"):
        text = (result.student / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert "/tmp" not in text
    found = json.loads((result.student / "settings.json").read_text(encoding="utf-8"))
    assert found["text"] == ["documents.txt"]
    assert found["output_dir"] == "run"
    assert DistillConfig.from_mapping(found).max_steps == 1
    assert settings(teacher="someone/bert").published().teacher == "someone/bert"
