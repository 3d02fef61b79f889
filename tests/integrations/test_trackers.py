"""Metrics of `minilm-distill` in the files of TensorBoard and Weights & Biases."""

import json

import pytest

from minilm_kernels.distill import DistillConfig, distill
from tests.distill.tiny import make_texts, save_model


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(60)), encoding="utf-8")
    return {
        "teacher": str(save_model(tmp_path / "teacher")),
        "copy_layers": (2,),
        "text": (str(tmp_path / "text.txt"),),
        "output_dir": str(tmp_path / "run"),
        "relation_heads": 12,
        "max_seq_length": 32,
        "total_batch_size": 4,
        "logging_steps": 1,
        "eval_samples": 4,
        "device": "cpu",
    }


def test_tensorboard_files_have_the_losses(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = distill(DistillConfig(**config, max_steps=3, report_to=("tensorboard",)))
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    records = list(map(json.loads, result.metrics.read_text(encoding="utf-8").splitlines()))
    losses = {record["step"]: record["loss"] for record in records if record["split"] == "train"}
    assert {event.step: event.value for event in found.Scalars("train/loss")} == pytest.approx(losses)
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 3]


def test_wandb_files_are_written_without_a_network(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    distill(DistillConfig(**config, max_steps=2, report_to=("wandb",)))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
