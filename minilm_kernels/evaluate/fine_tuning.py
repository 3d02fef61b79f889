"""Fine-tuning by transformers' Trainer on GLUE, SQuAD 2.0, XNLI, or a local file of classes."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from datasets import Dataset, load_dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from . import question_answering
from .score import Score, over_seeds
from .tasks import TASKS, Task

_METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews_correlation": matthews_corrcoef,
    "pearson": lambda labels, predicted: pearsonr(labels, predicted).statistic,
    "spearman": lambda labels, predicted: spearmanr(labels, predicted).statistic,
}


@dataclass(frozen=True)
class FineTuned:
    """The result of the best point of a grid.

    Attributes:
        score: the task's first metric, over the seeds.
        metrics: the mean of every metric over the seeds.
        learning_rate, epochs: the point.
    """

    score: Score
    metrics: dict[str, float]
    learning_rate: float
    epochs: int


def load_task(name: str, task: Task, folder: Path | None, languages: Sequence[str] = ()) -> dict[str, Dataset]:
    """The training split, and the split that is evaluated; with `languages`, one such split for each of them.

    Args:
        folder: local data, in the hub's columns: NAME/train.jsonl and NAME/validation.jsonl, for XNLI
            xnli/validation-LANGUAGE.jsonl. None for the hub.

    Raises:
        FileNotFoundError: a local file is missing.
        ConnectionError: the hub cannot be reached.
    """
    wanted: dict[str, tuple[str | None, str]] = {"train": (task.config, "train")}
    for language in languages:
        wanted[language] = (language, task.split)
    if not languages:
        wanted[task.split] = (task.config, task.split)
    if folder is None:
        return {key: load_dataset(task.dataset, config, split=split) for key, (config, split) in wanted.items()}
    found = {}
    for key, (_, split) in wanted.items():
        file = folder / name / (f"{split}-{language}.jsonl" if key in languages else f"{split}.jsonl")
        if not file.is_file():
            raise FileNotFoundError(f"--task-data: there is no file {file}")
        found[key] = Dataset.from_json(str(file))
    return found


def fine_tune(
    source: str, task: Task, data: dict[str, Dataset], seeds: Sequence[int], device: torch.device
) -> FineTuned:
    """Fine-tunes a model at every point of the task's grid, once per seed.

    Args:
        source: folder or hub name of the model.
        data: from `load_task`. The score is the mean over the evaluated splits.

    Returns:
        The point with the best mean score.
    """
    runs: list[FineTuned] = []
    for rate, epochs in itertools.product(task.learning_rates, task.epochs):
        found = [_run(source, task, data, seed, rate, epochs, device) for seed in seeds]
        means = {name: statistics.fmean(run[name] for run in found) for name in found[0]}
        runs.append(FineTuned(over_seeds([run[task.metrics[0]] for run in found]), means, rate, epochs))
    return max(runs, key=lambda run: run.score.value)


def classification_task(texts: Sequence[str], labels: Sequence[Any]) -> tuple[Task, dict[str, Dataset]]:
    """A task of a local file: a fifth of its texts is evaluated. Its grid is one point of GLUE's."""
    rows = Dataset.from_dict({"text": list(texts), "label": [str(label) for label in labels]})
    rows = rows.class_encode_column("label")
    split = rows.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
    task = replace(
        TASKS["sst2"], columns=("text",), labels=rows.features["label"].num_classes, learning_rates=(5e-5,), epochs=(3,)
    )
    return task, {"train": split["train"], "validation": split["test"]}


def _run(
    source: str, task: Task, data: dict[str, Dataset], seed: int, rate: float, epochs: int, device: torch.device
) -> dict[str, float]:
    """The metrics of one run: their means over the evaluated splits, and with several splits those of each."""
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output,
            learning_rate=rate,
            num_train_epochs=epochs,
            per_device_train_batch_size=task.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,  # a share of all steps
            weight_decay=0.01,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=None,
            use_cpu=device.type == "cpu",
            remove_unused_columns=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        kind = _question_answering if task.labels == 0 else _classification
        trainer, evaluate = kind(source, task, data["train"], tokenizer, arguments)
        trainer.train()
        found = {name: evaluate(trainer, rows) for name, rows in data.items() if name != "train"}
    means = {name: statistics.fmean(split[name] for split in found.values()) for name in task.metrics}
    if len(found) > 1:
        means |= {f"{split}_{name}": value for split, values in found.items() for name, value in values.items()}
    return means


_Evaluate = Callable[[Trainer, Dataset], dict[str, float]]


def _classification(
    source: str, task: Task, rows: Dataset, tokenizer: Any, arguments: TrainingArguments
) -> tuple[Trainer, _Evaluate]:
    def tokenized(rows: Dataset) -> Dataset:
        def encode(batch: dict[str, list[str]]) -> Any:
            return tokenizer(*(batch[name] for name in task.columns), truncation=True, max_length=task.max_tokens)

        return rows.map(encode, batched=True, remove_columns=[name for name in rows.column_names if name != "label"])

    def evaluate(trainer: Trainer, rows: Dataset) -> dict[str, float]:
        logits: Any = trainer.predict(tokenized(rows)).predictions
        predicted = logits[:, 0] if task.labels == 1 else logits.argmax(1)
        return {name: float(_METRICS[name](numpy.asarray(rows["label"]), predicted)) for name in task.metrics}

    kind = "regression" if task.labels == 1 else "single_label_classification"

    def model() -> Any:  # after the Trainer has set the seed of the new head
        return AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=task.labels, problem_type=kind, use_safetensors=True, trust_remote_code=False
        )

    collator = DataCollatorWithPadding(tokenizer)
    train = tokenized(rows)
    return Trainer(model_init=model, args=arguments, train_dataset=train, data_collator=collator), evaluate


def _question_answering(
    source: str, task: Task, rows: Dataset, tokenizer: Any, arguments: TrainingArguments
) -> tuple[Trainer, _Evaluate]:
    kept = ("example", "offsets")

    def tokenized(rows: Dataset) -> Dataset:
        def encode(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
            found = question_answering.tokenize(batch, tokenizer, task.max_tokens)
            return {**found, "example": [numbers[k] for k in found["example"]]}

        return rows.map(encode, with_indices=True, batched=True, remove_columns=rows.column_names)

    def evaluate(trainer: Trainer, rows: Dataset) -> dict[str, float]:
        inputs = tokenized(rows)
        logits: Any = trainer.predict(inputs.remove_columns(kept)).predictions
        start, end = logits[:2]
        found = question_answering.answers(start, end, inputs.select_columns(kept)[:], rows["context"])
        return question_answering.metrics(found, rows)

    def model() -> Any:
        return AutoModelForQuestionAnswering.from_pretrained(source, use_safetensors=True, trust_remote_code=False)

    collator = DataCollatorWithPadding(tokenizer)
    train = tokenized(rows).remove_columns(kept)
    return Trainer(model_init=model, args=arguments, train_dataset=train, data_collator=collator), evaluate
