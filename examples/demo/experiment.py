"""Trains a student for each seed, and compares it with its start, its teacher and static embeddings."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from minilm_kernels.distill import DistillConfig, DistillResult, distill
from minilm_kernels.evaluate.cli import main as evaluate
from minilm_kernels.students import copied_student

from . import MARKER, assets, markers
from .plot import plot_losses

SETTINGS: dict[str, Any] = {
    "copy_layers": (2, 4, 6),  # the teacher has six; the student keeps its last one
    "relation_heads": 12,
    "dropout": 0.0,
    "max_seq_length": 128,
    "total_batch_size": 8,
    "learning_rate": 5e-4,
    "logging_steps": 5,
    "eval_steps": 50,
    "eval_samples": 64,
    "save_steps": 100,
    "save_total_limit": 1,
}


def run(output: Path, seeds: Sequence[int], max_steps: int, update: Path | None = None) -> int:
    """Distills a student for each seed, runs `minilm-evaluate`, and writes loss.png and the folder evaluation.

    Runs that exist in `output` are continued, or used if they are finished, so that the same call continues a stopped
    demo.

    Args:
        output: folder for the results.
        seeds: one student is trained for each.
        max_steps: number of optimizer steps.
        update: Markdown file to write the table into, between its markers.

    Returns:
        0, 1 for an error of the evaluation, or 128 + the number of the signal that stopped the training.

    Raises:
        RuntimeError: the assets cannot be fetched.
        ValueError, OSError: `output` contains a run with other settings, or cannot be written.
    """
    folder, text, tests = assets.minilm_l6(), assets.wikipedia_text(), assets.test_sets()
    results: dict[int, DistillResult] = {}
    for seed in seeds:
        print(f"Distilling with seed {seed}", file=sys.stderr)
        config = DistillConfig(
            teacher=str(folder),
            output_dir=str(output / f"seed-{seed}"),
            text=(str(text.train),),
            eval_text=(str(text.evaluation),),
            max_steps=max_steps,
            seed=seed,
            resume_from_checkpoint=True,
            **SETTINGS,
        )
        results[seed] = distill(config)
        if stopped_by := results[seed].stopped_by:
            print("or run the command of the demo again", file=sys.stderr)
            return 128 + stopped_by
    curves = {
        seed: (_curve(result, "train", "loss"), _curve(result, "eval", "eval_loss")) for seed, result in results.items()
    }
    plot_losses(curves, output / "loss.png")

    start = output / "start"
    copied_student(AutoModel.from_pretrained(folder), SETTINGS["copy_layers"]).save_pretrained(start)
    AutoTokenizer.from_pretrained(folder).save_pretrained(start)
    students = [str(result.student) for result in results.values()]
    words = [str(start), *students, "--titles", "before", *(f"after, seed {seed}" for seed in seeds)]
    words += ["--teacher", str(folder), "--static", "--text", str(text.evaluation)]
    words += ["--distill-config", str(output / f"seed-{seeds[0]}" / "settings.json")]
    words += ["--classification", str(tests.topics), "--pairs", str(tests.similarity)]
    words += ["--retrieval", str(tests.headlines), "--output-dir", str(output / "evaluation")]
    if status := evaluate(words):
        return status
    print(f"losses   {output / 'loss.png'}")
    for student in students:
        print(f"student  {student}")
    if update:
        command = f"python -m examples.demo --seeds {' '.join(map(str, seeds))} --update {update.name}"
        table = (output / "evaluation" / "results.md").read_text(encoding="utf-8")
        markers.update(update, MARKER, _section(table, max_steps, command))
        print(f"table    {update}")
    return 0


def _curve(result: DistillResult, split: str, key: str) -> list[tuple[int, float]]:
    records = map(json.loads, result.metrics.read_text(encoding="utf-8").splitlines())
    return [(record["step"], record[key]) for record in records if record["split"] == split]


def _section(table: str, max_steps: int, command: str) -> str:
    """The table, followed by its settings and the command that reproduces it."""
    layers = ", ".join(map(str, SETTINGS["copy_layers"]))
    lines = [
        table,
        f"The student starts with layers {layers} of the teacher and is trained for {max_steps} steps",
        f"of {SETTINGS['total_batch_size']} × {SETTINGS['max_seq_length']} tokens,",
        f"with {SETTINGS['relation_heads']} relation heads and learning rate {SETTINGS['learning_rate']:g},",
        f"on {torch.get_num_threads()} CPU threads",
        f"(torch {torch.__version__}, transformers {transformers.__version__}).",
        f"`{command}` makes this table.",
    ]
    return "\n".join(lines)
