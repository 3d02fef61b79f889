"""`minilm-evaluate --mteb` with the benchmark's own small tasks, which need no network."""

import json

import pytest
import torch
from mteb import mocks

from minilm_kernels.evaluate import mteb_tasks
from minilm_kernels.evaluate.cli import main
from minilm_kernels.evaluate.encoders import load_candidate
from tests.distill.tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def test_scores_of_several_kinds_of_tasks(model):
    tasks = [mocks.MockSTSTask(), mocks.MockClassificationTask(), mocks.MockRetrievalTask()]
    found = mteb_tasks.main_scores(load_candidate(str(model), "tiny", torch.device("cpu"), 32), tasks)
    assert list(found) == [task.metadata.name for task in tasks]
    assert all(-1 <= score <= 1 for score in found.values())


def test_a_task_is_a_column_of_the_table(model, tmp_path, monkeypatch):
    monkeypatch.setattr(mteb_tasks, "get_tasks", lambda names: [mocks.MockSTSTask() for _ in names])
    assert main([str(model), "--mteb", "MockSTS", "--no-speed", "--output-dir", str(tmp_path), "--device", "cpu"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    value, low, high = row["scores"][mocks.MockSTSTask().metadata.name]
    assert -1 <= value <= 1
    assert low is None
    assert high is None


def test_unknown_tasks_are_refused(model, capsys):
    assert main([str(model), "--mteb", "NoSuchTask"]) == 1
    assert "--mteb: " in capsys.readouterr().err
