"""All tests of all models, in the order in which they are cheapest to fail."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilm_kernels.distill.config import DistillConfig
from minilm_kernels.distill.config_file import read_settings

from . import embedding_tasks, fine_tuning, mteb_tasks, report, speed
from .encoders import Candidate, distilled_static, load_candidate
from .local_files import read_columns
from .relation_kl import relation_kl
from .score import Score
from .tasks import TASKS, Task

_FROZEN: dict[str, tuple[Any, tuple[str, ...]]] = {
    "classification": (embedding_tasks.linear_probe, ("text", "label")),
    "pairs": (embedding_tasks.pair_similarity, ("sentence1", "sentence2", "score")),
    "retrieval": (embedding_tasks.retrieval_accuracy, ("query", "answer")),
}


# The settings of a run on which its evaluation loss depends, without its models and its text.
_LOSS_SETTINGS = (
    "method",
    "relations",
    "relation_heads",
    "teacher_layer",
    "student_layer",
    "teacher_projections",
    "student_projections",
    "mask",
    "prefix_range",
    "reduction",
    "documents",
    "text_column",
    "packing",
    "max_seq_length",
    "eval_samples",
    "seed",
)


def compare(options: argparse.Namespace) -> int:
    """Evaluates all models, prints the table, and writes the results. Returns the exit status, 0.

    Every file and every model is read before the first test. A model that a test cannot serve, such as static
    embeddings in the relation KL, has no figure there; the table is followed by the reasons.

    Raises:
        FileNotFoundError, ValueError: a model, a file or a task cannot be used.
        ImportError: mteb is needed and not installed.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    files = {
        Path(file).stem: (test, read_columns(file, f"--{kind}", columns), kind)
        for kind, (test, columns) in _FROZEN.items()
        for file in getattr(options, kind)
    }
    settings = _distill_settings(options)
    mteb = mteb_tasks.get_tasks(options.mteb) if options.mteb else []
    tuned = _fine_tuning_tasks(options, files)
    candidates = _candidates(options, device)
    rows = [report.Row(one.title, one.parameters) for one in candidates]
    reference = next((row for row in rows if row.title == "teacher"), None)

    if options.speed:
        _say("speed")
        for row, measured in zip(rows, speed.measure(candidates, options.max_seq_length), strict=True):
            row.speed = measured
    for row, one in zip(rows, candidates, strict=True):
        if settings and one.source is not None:
            _say(f"{one.title}: relation KL")
            _try(row, report.KL, lambda one=one: _kl(settings, one.source, device))
        for name, (test, columns, _) in files.items():
            _say(f"{one.title}: {name}")
            row.scores[name] = _named(name, test, one.encoder, *columns)
        for task, value in (mteb_tasks.main_scores(one, mteb) if mteb else {}).items():
            row.scores[task] = Score(value, float("nan"), float("nan"))
        for name, (benchmark, data) in tuned.items():
            if one.source is None:
                row.notes.append(f"{name}: static embeddings are not fine-tuned")
                continue
            _say(f"{one.title}: fine-tuning on {name}, {len(benchmark.learning_rates) * len(benchmark.epochs)} points")
            found = fine_tuning.fine_tune(one.source, benchmark, data, options.seeds, device)
            row.scores[name] = found.score
            row.details[name] = {
                **found.metrics, "learning_rate": found.learning_rate, "epochs": found.epochs,
            }  # fmt: skip
        report.write(rows, reference, options.output_dir, _recorded(options))  # kept if a later test fails
    print(report.table(rows, reference))
    for row in rows:
        for note in row.notes:
            print(f"{row.title}: {note}")
    for file in report.write(rows, reference, options.output_dir, _recorded(options)):
        print(file)
    return 0


def _candidates(options: argparse.Namespace, device: torch.device) -> list[Candidate]:
    """The models, then the teacher, then the static embeddings."""
    titles = options.titles or [_title(name) for name in options.models]
    names = list(zip(options.models, titles, strict=True))
    if options.teacher:
        names.append((options.teacher, "teacher"))
    found = []
    for name, title in names:
        _say(f"loading {name}")
        found.append(load_candidate(name, title, device, options.max_seq_length))
    if options.static:
        _say("static embeddings of the teacher's vocabulary")
        found.append(distilled_static(options.teacher, device, options.max_seq_length))
    return found


def _title(name: str) -> str:
    """The last two parts of a path or hub name."""
    return "/".join(Path(name).parts[-2:])


def _distill_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of the relation KL, without a student; empty without text."""
    if not options.text:
        return {}
    settings = dict(read_settings(options.distill_config)) if options.distill_config else {}
    settings = {name: value for name, value in settings.items() if name in _LOSS_SETTINGS}
    if options.relation_heads:
        settings["relation_heads"] = options.relation_heads
    settings |= {
        "teacher": options.teacher,
        "text": tuple(options.text),  # not read: the evaluation text is a separate one
        "eval_text": tuple(options.text),
        "output_dir": str(options.output_dir),
    }
    settings.setdefault("max_seq_length", options.max_seq_length)
    DistillConfig.from_mapping({**settings, "student": options.teacher}, "options")  # errors before any work
    return settings


def _kl(settings: dict[str, Any], source: str, device: torch.device) -> Score:
    return relation_kl(DistillConfig.from_mapping({**settings, "student": source}, "options"), device)


def _fine_tuning_tasks(options: argparse.Namespace, files: dict[str, Any]) -> dict[str, tuple[Task, Any]]:
    """Task and data of each fine-tuning, by its name in the table."""

    def restricted(task: Task) -> Task:
        rates, epochs = options.learning_rates, options.epochs
        task = replace(task, learning_rates=tuple(rates)) if rates else task
        return replace(task, epochs=tuple(epochs)) if epochs else task

    found = {}
    for name in options.tasks:
        languages: Sequence[str] = options.xnli_languages if name == "xnli" else ()
        found[name] = (restricted(TASKS[name]), fine_tuning.load_task(name, TASKS[name], options.task_data, languages))
    if options.fine_tune:
        for name, (_, columns, kind) in files.items():
            if kind == "classification":
                task, data = fine_tuning.classification_task(*columns)
                found[f"{name}, fine-tuned"] = (restricted(task), data)
    return found


def _named(name: str, test: Any, *arguments: Any) -> Score:
    try:
        return test(*arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _try(row: report.Row, test: str, measure: Any) -> None:
    try:
        row.scores[test] = measure()
    except ValueError as error:  # the model does not fit the teacher
        row.notes.append(f"{test}: {error}")


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _say(message: str) -> None:
    print(f"minilm-evaluate: {message}", file=sys.stderr, flush=True)
