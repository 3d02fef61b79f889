"""The folder of a finished student: model, tokenizer, settings, metrics and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import minilm_kernels

from .checkpoint import write_folder
from .config import DistillConfig
from .metrics import EvalRecords
from .models import TeacherStudent


def write_student(
    target: Path,
    config: DistillConfig,
    models: TeacherStudent,
    weights: dict[str, Tensor],
    metrics: Path,
    evaluations: EvalRecords,
    processes: int,
    step: int,
) -> None:
    """Writes the folder of the finished student atomically: it is complete or does not exist.

    Args:
        target: the folder.
        weights: state dict of the student.
        metrics: the metrics.jsonl of the run, which is copied.
        evaluations: the first and the last eval record, if there are any.
        processes: number of processes of the run.
        step: the step of the weights.

    Raises:
        OSError: the folder cannot be written.
    """

    def fill(folder: Path) -> None:
        models.student.model.save_pretrained(folder, state_dict=weights)
        models.student_tokenizer.save_pretrained(folder)
        (folder / "settings.json").write_text(
            json.dumps(config.published().as_dict(), indent=1) + "\n", encoding="utf-8"
        )
        (folder / "README.md").write_text(model_card(config, models, evaluations, processes, step), encoding="utf-8")
        shutil.copy(metrics, folder / "metrics.jsonl")

    write_folder(target, fill)


def model_card(
    config: DistillConfig, models: TeacherStudent, evaluations: EvalRecords, processes: int, step: int
) -> str:
    """The model card in Markdown, with the YAML front matter that the Hugging Face hub reads."""
    trained = models.trained()
    untrained = [name for name, _ in models.student.model.named_parameters() if name not in trained]
    vocabulary = models.vocabulary
    student, teacher = models.student.model.config, models.teacher.model.config
    parameters = sum(parameter.numel() for parameter in models.student.model.parameters())
    sizes = f"{teacher.num_hidden_layers} layers, hidden size {teacher.hidden_size}"
    through = f" through an assistant ({sizes})" if config.teacher_assistant else f" ({sizes})"
    taught_by = "the assistant's" if config.teacher_assistant else "teacher"
    relations = ", ".join(f"{name} (weight {weight:g})" for name, weight in models.loss.relations.items())
    best = (
        "" if step == config.max_steps else f" The weights are those of step {step}, with the lowest evaluation loss."
    )
    metadata = _front_matter(config)  # it asks whether the teacher is a local folder
    config = config.published()
    lines = [
        *metadata,
        "# Distilled student",
        "",
        f"A student of {student.num_hidden_layers} layers, hidden size {student.hidden_size} and {parameters:,} "
        f"parameters, distilled from `{config.teacher}`{through}."
        + ("" if vocabulary is None else f" {vocabulary.summary(models.tokenizer)}."),
        "",
        "```python",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'student = AutoModel.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Training",
        "",
        f"Method {config.method} with relations {relations} and {models.loss.num_heads} heads, from {taught_by} layer "
        f"{models.teacher.extractor.layer} to student layer {models.student.extractor.layer}, {models.mask} mask; "
        f"{config.max_steps} steps of {config.total_batch_size} samples of up to {config.max_seq_length} tokens.{best}",
        "",
        "```",
        config.command(processes),
        "```",
        "",
        "`settings.json` contains all settings: `minilm-distill --config settings.json --output-dir FOLDER` repeats",
        "the run. Local files and folders are named without their path. `metrics.jsonl` contains the losses.",
        "",
        f"Versions: minilm_kernels {minilm_kernels.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
        "",
    ]
    if evaluations is not None:
        before, after = evaluations
        lines += ["## Evaluation", "", "| relation KL | before | after |", "|---|---|---|"]
        numeric = (int, float)
        for name in ("loss", *models.loss.relations):
            values = before.get(f"eval_{name}"), after.get(f"eval_{name}")
            if all(isinstance(value, numeric) for value in values):
                lines.append(f"| {name} | {values[0]:.4f} | {values[1]:.4f} |")
        lines.append("")
    lines += ["## Untrained tensors", ""]
    if untrained:
        lines += [
            "The loss depends on the projections of the student's layer, so the tensors after them were not trained.",
            "They have their initial values, and fine-tuning trains them:",
            "",
            *[f"- `{name}`" for name in untrained],
        ]
    else:
        lines.append("None.")
    return "\n".join(lines) + "\n"


def _front_matter(config: DistillConfig) -> list[str]:
    """YAML metadata. The license is left out, because it depends on the teacher and the text."""
    base_model = [] if Path(config.teacher).exists() else [f"base_model: {_quoted(config.teacher)}"]
    dataset = config.dataset_name is not None and not Path(config.dataset_name).exists()
    datasets = ["datasets:", f"- {_quoted(config.dataset_name)}"] if dataset else []
    tags = ["knowledge-distillation", config.method, "minilm_kernels"]
    return [
        "---",
        "library_name: transformers",
        "pipeline_tag: feature-extraction",
        *base_model,
        *datasets,
        "tags:",
        *[f"- {tag}" for tag in tags],
        "---",
        "",
    ]


def _quoted(value: Any) -> str:
    """Formats a text as a JSON string, which is also a valid YAML string."""
    return json.dumps(value)
