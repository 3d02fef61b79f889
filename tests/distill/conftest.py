"""Fixtures of the distillation tests: a saved teacher, text, and settings of a short run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minilm_kernels.distill import DistillConfig

from .tiny import make_texts, save_model


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs tests on one thread, which is faster for tiny operators, and restores the number of threads."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with 2 layers, hidden size 48, 65 tokens and 40 positions."""
    return save_model(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents, separated by blank lines."""
    file = tmp_path_factory.mktemp("text") / "documents.txt"
    file.write_text("\n\n".join(make_texts(300)), encoding="utf-8")
    return file


def short_run(teacher: Path, text: Path, output: Path, /, **changes: Any) -> DistillConfig:
    """Settings of a short run. `changes` replace defaults or are added."""
    base = {
        "teacher": str(teacher),
        "output_dir": str(output),
        "text": [str(text)],
        "student_num_hidden_layers": 1,
        "student_hidden_size": 24,
        "student_num_attention_heads": 4,
        "relation_heads": 12,
        "max_seq_length": 32,
        "total_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "eval_fraction": 0.1,
        "eval_samples": 12,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "device": "cpu",
    }
    merged = {**base, **changes}
    if "student" in changes or "copy_layers" in changes:
        merged |= {"student_num_hidden_layers": None, "student_hidden_size": None}
    return DistillConfig(**merged)


@pytest.fixture
def settings(teacher_folder: Path, text_file: Path, tmp_path: Path) -> Callable[..., DistillConfig]:
    """Creates the settings of a short run. Arguments replace defaults or are added."""

    def make(**changes: Any) -> DistillConfig:
        return short_run(teacher_folder, text_file, tmp_path / "run", **changes)

    return make
