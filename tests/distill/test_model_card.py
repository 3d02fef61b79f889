"""The model card of a student: its metadata and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.model_card import model_card
from minilm_kernels.distill.models import load_models


def front_matter(card: str) -> dict[str, object]:
    start, metadata, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(metadata)


def test_metadata(settings: Callable[..., DistillConfig], tmp_path: Path) -> None:
    config = settings()
    models = load_models(config, torch.device("cpu"))
    local = front_matter(model_card(config, models, None, 1, config.max_steps))
    assert local == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["knowledge-distillation", "minilmv2", "minilm_kernels"],
    }
    hub = replace(config, teacher="someone/bert: a 'model'", text=(), dataset_name="someone/text")
    assert front_matter(model_card(hub, models, None, 1, hub.max_steps)) == {
        **local,
        "base_model": "someone/bert: a 'model'",
        "datasets": ["someone/text"],
    }
    assert "license" not in front_matter(model_card(hub, models, None, 1, hub.max_steps))


def test_evaluations_are_a_table(settings: Callable[..., DistillConfig]) -> None:
    config = settings()
    models = load_models(config, torch.device("cpu"))
    before = {"step": 0, "eval_loss": 3.0, "eval_qq": 1.0, "eval_kk": 1.5, "eval_vv": 0.5}
    after = {**before, "eval_loss": 1.5, "eval_vv": None}
    card = model_card(config, models, (before, after), 2, 4)
    assert "| loss | 3.0000 | 1.5000 |\n| qq | 1.0000 | 1.0000 |\n| kk | 1.5000 | 1.5000 |\n\n" in card
    assert config.published().command(2) in card
    assert "The weights are those of step 4" in card
