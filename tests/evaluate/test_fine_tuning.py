"""Fine-tuning on local files with the columns of the hub's data sets."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minilm_kernels.evaluate.fine_tuning import classification_task, fine_tune, load_task
from minilm_kernels.evaluate.tasks import TASKS, Task
from tests.distill.tiny import WORDS

CPU = torch.device("cpu")
FAST = {"learning_rates": (1e-3,), "epochs": (1,), "batch_size": 8}


def text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS[10:], k=6))


def row(task: Task, chance: random.Random) -> dict[str, Any]:
    """A row of the task: the label says whether the last text contains the word w0."""
    label = chance.randrange(max(2, task.labels))
    found: dict[str, Any] = {column: text(chance) for column in task.columns}
    if task.labels == 0:
        words = found["context"].split()
        begin = found["context"].index(words[3])
        found["answers"] = {"text": [words[3]], "answer_start": [begin]} if label else {"text": [], "answer_start": []}
        return found
    found[task.columns[-1]] = f"w{label} " + found[task.columns[-1]]
    return {**found, "label": float(label) if task.labels == 1 else label, "idx": 0}


def write(folder: Path, name: str, splits: list[str], count: int) -> None:
    chance = random.Random(0)
    (folder / name).mkdir(parents=True)
    for split in splits:
        lines = [json.dumps(row(TASKS[name], chance)) for _ in range(count)]
        (folder / name / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_on_files_of_its_columns(tmp_path: Path, model: Path, name: str) -> None:
    languages = ["de", "en"] if name == "xnli" else []
    splits = [f"validation-{language}" for language in languages] or [TASKS[name].split]
    write(tmp_path, name, ["train", *splits], 16)
    task = replace(TASKS[name], **FAST, max_tokens=32)
    data = load_task(name, task, tmp_path, languages)
    found = fine_tune(str(model), task, data, [0], CPU)
    assert set(task.metrics) <= set(found.metrics)
    assert all(-1 <= value <= 1 for value in found.metrics.values())
    assert found.score.value == found.metrics[task.metrics[0]]
    if languages:
        assert found.metrics["accuracy"] == pytest.approx(
            (found.metrics["de_accuracy"] + found.metrics["en_accuracy"]) / 2
        )


@pytest.mark.slow
def test_a_rule_is_learned_and_the_best_point_is_chosen(tmp_path: Path, model: Path) -> None:
    write(tmp_path, "mrpc", ["train", "validation"], 200)
    task = replace(TASKS["mrpc"], learning_rates=(1e-8, 1e-3), epochs=(4,), batch_size=16)
    found = fine_tune(str(model), task, load_task("mrpc", task, tmp_path), [0, 1], CPU)
    assert found.learning_rate == 1e-3
    assert found.score.value > 0.95
    assert found.score.low <= found.score.value <= found.score.high


def test_local_classes_are_split_by_class() -> None:
    texts, labels = [f"text {k}" for k in range(50)], ["a", "b", "b", "b", "b"] * 10
    task, data = classification_task(texts, labels)
    assert task.labels == 2
    assert len(data["validation"]) == 10
    assert sum(data["validation"]["label"]) == 8
    assert not set(data["train"]["text"]) & set(data["validation"]["text"])


def test_missing_local_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--task-data: there is no file .*rte/train.jsonl"):
        load_task("rte", TASKS["rte"], tmp_path)


def test_grid_of_the_paper() -> None:
    """MiniLM, arXiv:2002.10957, appendix B."""
    glue = [task for name, task in TASKS.items() if task.dataset == "nyu-mll/glue"]
    assert len(glue) == 8
    for task in glue:
        assert task.learning_rates == (2e-5, 3e-5, 4e-5, 5e-5)
        assert task.epochs[:3] == (3, 4, 5)
        assert (task.batch_size, task.max_tokens) == (32, 128)
    squad, xnli = TASKS["squad_v2"], TASKS["xnli"]
    assert (squad.learning_rates, squad.epochs, squad.batch_size, squad.max_tokens) == ((6e-5,), (3,), 32, 384)
    assert (xnli.learning_rates, xnli.epochs, xnli.batch_size) == ((3e-5, 4e-5, 5e-5, 6e-5), (5,), 128)
