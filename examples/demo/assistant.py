"""`python -m examples.demo.assistant`: compares students that are distilled directly and through an assistant."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import markers

MARKER = "assistant"
HEADS = 12  # attention heads of teacher, assistant and student
ASSISTANT = "6x192"  # as many layers as the teacher, and the width of the student
SETTINGS: dict[str, Any] = {
    "method": "minilm",
    "student_num_hidden_layers": 3,
    "student_hidden_size": 192,  # half of the teacher's
    "student_num_attention_heads": HEADS,
    "dropout": 0.0,
    "max_seq_length": 128,
    "total_batch_size": 8,
    "learning_rate": 1e-3,
    "eval_fraction": 0.0,  # the teacher of a student with an assistant is the assistant
    "save_total_limit": 1,
}
WAYS = ("direct", "assistant")
COLUMNS = {"eval_kl": "eval relation KL", "bbc_accuracy": "BBC accuracy", "lee_r": "Lee r"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Returns:
        0 for success, 1 for an error, and 128 + the signal number if a signal stopped it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.assistant",
        description="Distill MiniLM-L6 into students of three layers and half its width, directly and through an "
        "assistant, with the same total number of steps, and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("assistant-output"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; two runs for each")
    parser.add_argument("--max-steps", type=int, default=600, help="number of optimizer steps of all stages together")
    begin, _ = markers.markers(MARKER)
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help=f"Markdown file to write the table into, after {begin}"
    )
    options = parser.parse_args(argv)
    if options.max_steps < 2 or options.max_steps % 2:
        parser.error(f"--max-steps: expected an even number, half of it for each stage, got {options.max_steps}")
    try:
        if options.update:
            markers.check_markers(options.update, MARKER)
        return _run(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from transformers import AutoModel, AutoTokenizer  # takes seconds

    from minilm_kernels.distill import DistillConfig, distill

    from . import assets
    from .probes import probe

    folder, text, news, rated = assets.minilm_l6(), assets.wikipedia_text(), assets.bbc_news(), assets.lee_similarity()
    lines = text.evaluation.read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    teacher, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def figures(student: Any) -> dict[str, float]:
        return {
            "eval_kl": relation_kl(teacher, student, tokenizer, documents),
            **probe(student, tokenizer, news, rated),
        }

    rows: list[tuple[str, str, str, dict[str, float]]] = []
    for way in WAYS:
        for seed in options.seeds:
            print(f"Distilling with seed {seed}, {way}", file=sys.stderr)
            half = options.max_steps // 2
            config = DistillConfig(
                teacher=str(folder),
                output_dir=str(options.output_dir / f"{way}-{seed}"),
                text=(str(text.train),),
                teacher_assistant=ASSISTANT if way == "assistant" else (),
                max_steps=half if way == "assistant" else options.max_steps,
                seed=seed,
                resume_from_checkpoint=True,
                **SETTINGS,
            )
            result = distill(config)
            if result.stopped_by:
                return 128 + result.stopped_by
            steps = f"{half} + {half}" if way == "assistant" else str(options.max_steps)
            rows.append((way, str(seed), steps, figures(AutoModel.from_pretrained(str(result.student)))))
    rows.append(("teacher", "", "", figures(teacher)))
    table = format_table(rows)
    print(table)
    if options.update:
        words = [f"--seeds {' '.join(map(str, options.seeds))}", f"--max-steps {options.max_steps}"]
        command = f"python -m examples.demo.assistant {' '.join(words)} --update {options.update}"
        markers.update(options.update, MARKER, f"{table}\n`{command}`\nreproduces this table.")
    return 0


def relation_kl(teacher: Any, student: Any, tokenizer: Any, documents: Sequence[str], batch_size: int = 16) -> float:
    """Mean loss of MiniLM over documents, between the last layers of two models, in nats.

    Args:
        documents: texts, which are cut to `max_seq_length` tokens.
    """
    import torch

    from minilm_kernels import MiniLMLoss, QKVExtractor

    extractors = [QKVExtractor(model.eval(), frozen=True) for model in (teacher, student)]
    loss = MiniLMLoss(HEADS, reduction="sequence")
    total = 0.0
    for start in range(0, len(documents), batch_size):
        part = list(documents[start : start + batch_size])
        limits = {"truncation": True, "max_length": SETTINGS["max_seq_length"]}
        batch = tokenizer(part, padding=True, return_tensors="pt", **limits)
        with torch.no_grad():
            value = loss(*(extractor(**batch) for extractor in extractors), batch["attention_mask"])
        total += len(part) * float(value)
    return total / len(documents)


def format_table(rows: Sequence[tuple[str, str, str, dict[str, float]]]) -> str:
    """A Markdown table with a line per run, and lines of means.

    Args:
        rows: way of training, seed, steps, and figures by the names in `COLUMNS`.
    """
    lines = [["distilled", "seed", "steps", *COLUMNS.values()]]
    for way in dict.fromkeys(row[0] for row in rows):
        runs = [row for row in rows if row[0] == way]
        mean = {name: sum(run[3][name] for run in runs) / len(runs) for name in COLUMNS}
        for _, seed, steps, figures in [*runs, *([(way, "mean", runs[0][2], mean)] if len(runs) > 1 else [])]:
            lines.append([way, seed, steps, *(f"{figures[name]:.3f}" for name in COLUMNS)])
    lines.insert(1, ["---", *("---:" for _ in lines[0][1:])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
