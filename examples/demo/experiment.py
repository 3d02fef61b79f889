"""Trains a student for each seed, and evaluates it before and after training and beside its teacher."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from minilm_kernels import __version__
from minilm_kernels.distill import DistillConfig, DistillResult, distill
from minilm_kernels.students import copied_student

from . import MARKER, assets, markers, report
from .plot import plot_losses
from .probes import probe

SETTINGS: dict[str, Any] = {
    "copy_layers": (2, 4, 6),  # the teacher has six; the student keeps its last one
    "relation_heads": 12,
    "dropout": 0.0,
    "max_seq_length": 128,
    "total_batch_size": 8,
    "learning_rate": 5e-4,
    "logging_steps": 5,
    "eval_steps": 25,
    "save_steps": 100,
    "save_total_limit": 1,
}


def run(output: Path, seeds: Sequence[int], max_steps: int, update: Path | None = None) -> int:
    """Distills a student for each seed, writes results.json and loss.png, and prints the table.

    Runs that exist in `output` are continued, or used if they are finished, so that the same call continues a stopped
    demo.

    Args:
        output: folder for the results.
        seeds: one student is trained for each.
        max_steps: number of optimizer steps.
        update: Markdown file to write the table into, between its markers.

    Returns:
        0, or 128 + the number of the signal that stopped the training.

    Raises:
        RuntimeError: the assets cannot be fetched.
        ValueError, OSError: `output` contains a run with other settings, or cannot be written.
    """
    folder, text, news, rated = assets.minilm_l6(), assets.wikipedia_text(), assets.bbc_news(), assets.lee_similarity()
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

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def row(title: str, model: Any, losses: Mapping[str, Any] | None = None) -> dict[str, Any]:
        print(f"Evaluating: {title}", file=sys.stderr, flush=True)
        return {"model": title, **_losses(losses or {}), **probe(model, tokenizer, news, rated)}

    teacher = AutoModel.from_pretrained(folder)
    start = copied_student(teacher, SETTINGS["copy_layers"])
    rows = [row("before", start, results[seeds[0]].eval_before)]
    for seed, result in results.items():
        after = row(f"after, seed {seed}", AutoModel.from_pretrained(str(result.student)), result.eval_after)
        rows.append({**after, "seed": seed, "training_seconds": _training_seconds(_records(result, "train"))})
    rows.append(row("teacher", teacher))

    record = {"settings": {**SETTINGS, "max_steps": max_steps}, "versions": _versions(), "rows": rows}
    (output / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    curves = {
        seed: (_curve(result, "train", "loss"), _curve(result, "eval", "eval_loss")) for seed, result in results.items()
    }
    plot_losses(curves, output / "loss.png")
    print(f"\n{report.table(rows)}\nlosses   {output / 'loss.png'}\nfigures  {output / 'results.json'}")
    for result in results.values():
        print(f"student  {result.student}")
    if update:
        markers.update(
            update, MARKER, report.section(record, f"--seeds {' '.join(map(str, seeds))} --update {update.name}")
        )
        print(f"table    {update}")
    return 0


def _losses(evaluation: Mapping[str, Any]) -> dict[str, float]:
    names = {"eval_loss": "eval_kl", "eval_qq": "eval_kl_qq", "eval_kk": "eval_kl_kk", "eval_vv": "eval_kl_vv"}
    return {title: evaluation[name] for name, title in names.items() if name in evaluation}


def _records(result: DistillResult, split: str) -> list[dict[str, Any]]:
    records = map(json.loads, result.metrics.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["split"] == split]


def _curve(result: DistillResult, split: str, key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in _records(result, split)]


def _training_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    """Time of the optimizer steps over all parts of a run, without evaluation and checkpoints."""
    tokens = [0, *(record["tokens"] for record in records)]
    return sum(
        (after - before) / record["tokens_per_second"]
        for before, after, record in zip(tokens, tokens[1:], records, strict=False)
    )


def _versions() -> dict[str, Any]:
    return {
        "minilm_kernels": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
