"""Fixtures: tiny models, and a sentence encoder whose features are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distill.conftest import _one_thread  # noqa: F401, applies here as well
from tests.distill.tiny import save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with 2 layers, hidden size 48, 65 tokens and 40 positions."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same sizes."""
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


class KnownFeatures:
    """Stands in for a `SentenceTransformer`: looks the features of a text up."""

    def __init__(self, features: dict[str, Sequence[float]]) -> None:
        self.features = features

    def encode(self, texts: list[str], convert_to_tensor: bool = False, **options: Any) -> Any:
        found = torch.tensor([self.features[text] for text in texts])
        return found if convert_to_tensor else found.numpy()
