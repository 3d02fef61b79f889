"""The folder that a finished run leaves: the student as `AutoModel` loads it, and how it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers

import minilm_kernels

from .checkpoint import write_folder
from .config import DistillConfig
from .metrics import HeldOutRecords
from .models import Pair


def write_result(
    target: Path,
    config: DistillConfig,
    pair: Pair,
    metrics: Path,
    heldout: HeldOutRecords,
    processes: int,
) -> None:
    """Writes model, tokenizer, settings.json, metrics.jsonl and README.md, all or nothing.

    Args:
        heldout: held-out losses before the first step and after the last, if they were measured.
        processes: how many made it.

    Raises:
        OSError: the folder cannot be written.
    """

    def fill(folder: Path) -> None:
        pair.student.model.save_pretrained(folder)
        pair.tokenizer.save_pretrained(folder)
        (folder / "settings.json").write_text(json.dumps(config.as_dict(), indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_readme(config, pair, heldout, processes), encoding="utf-8")
        shutil.copy(metrics, folder / "metrics.jsonl")

    write_folder(target, fill)


def _readme(config: DistillConfig, pair: Pair, heldout: HeldOutRecords, processes: int) -> str:
    trained = pair.trained()
    untrained = [name for name, _ in pair.student.model.named_parameters() if name not in trained]
    student, teacher = pair.student.model.config, pair.teacher.model.config
    parameters = sum(parameter.numel() for parameter in pair.student.model.parameters())
    relations = ", ".join(f"{name} (weight {weight:g})" for name, weight in pair.loss.relations.items())
    lines = [
        "# Distilled student",
        "",
        f"{student.num_hidden_layers} layers, hidden size {student.hidden_size}, {parameters:,} parameters; teacher "
        f"`{config.teacher}` ({teacher.num_hidden_layers} layers, hidden size {teacher.hidden_size}).",
        "",
        "```python",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'student = AutoModel.from_pretrained("path/of/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        "```",
        "",
        "## How it was made",
        "",
        f"Method {config.method}: relations {relations}; {pair.loss.num_heads} heads; teacher layer "
        f"{pair.teacher.extractor.layer}, student layer {pair.student.extractor.layer}; {config.mask} mask; "
        f"{config.steps} steps of {config.batch_size} rows of at most {config.seq_len} tokens.",
        "",
        "```",
        config.command(processes),
        "```",
        "",
        "`settings.json` holds every setting; `minilm-distill --config settings.json --output FOLDER` repeats the run.",
        "`metrics.jsonl` holds the losses.",
        f"Made with minilm_kernels {minilm_kernels.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
        "",
    ]
    if heldout is not None:
        before, after = heldout
        lines += ["| held-out relation KL | before | after |", "|---|---|---|"]
        numeric = (int, float)
        both = [name for name in ("loss", *pair.loss.relations) if isinstance(before.get(name), numeric)]
        names = [name for name in both if isinstance(after.get(name), numeric)]
        lines += [f"| {name} | {before[name]:.4f} | {after[name]:.4f} |" for name in names]
        lines.append("")
    lines += ["## Tensors that distillation did not reach", ""]
    if untrained:
        lines += [
            "The loss is taken at the projections of the student's layer, so nothing after them was trained.",
            "These tensors keep their initial values; fine-tuning trains them:",
            "",
            *[f"- `{name}`" for name in untrained],
        ]
    else:
        lines.append("None.")
    return "\n".join(lines) + "\n"
