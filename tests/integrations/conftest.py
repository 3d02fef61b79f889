"""No test of this folder needs a network, and no trainer draws progress bars."""

import os

os.environ.update(HF_HUB_OFFLINE="1")  # before the hub's client is imported

import datasets
import pytest


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()
