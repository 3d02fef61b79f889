"""`python -m examples.demo.assistant`: compares students that are distilled directly and through an assistant."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from . import study

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Returns:
        0 for success, 1 for an error, and 128 + the signal number if a signal stopped it.
    """
    return study.main(
        "assistant",
        "Distill MiniLM-L6 into students of three layers and half its width, directly and through an "
        "assistant, with the same total number of steps, and compare them.",
        600,
        lambda steps: "" if steps >= 2 and steps % 2 == 0 else "an even number, half of it for each stage",
        _compare,
        argv,
    )


def _compare(options: argparse.Namespace) -> str | int:
    from minilm_kernels.distill import DistillConfig, distill  # imports transformers, which takes seconds
    from minilm_kernels.evaluate.cli import main as evaluate

    from . import assets

    folder, text, tests = assets.minilm_l6(), assets.wikipedia_text(), assets.test_sets()
    half = options.max_steps // 2
    students: dict[str, str] = {}  # title -> folder
    for way in WAYS:
        for seed in options.seeds:
            print(f"Distilling with seed {seed}, {way}", file=sys.stderr)
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
            students[f"{way}, seed {seed}"] = str(result.student)
    output = options.output_dir / "evaluation"
    words = [*students.values(), "--titles", *students, "--teacher", str(folder), "--text", str(text.evaluation)]
    words += ["--distill-config", str(options.output_dir / f"{WAYS[0]}-{options.seeds[0]}" / "settings.json")]
    words += ["--classification", str(tests.topics), "--pairs", str(tests.similarity)]
    words += ["--retrieval", str(tests.headlines), "--output-dir", str(output), "--no-speed"]
    if status := evaluate(words):
        return status
    return format_table(json.loads((output / "results.json").read_text(encoding="utf-8"))["rows"])


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of scores with a line per run, and lines of means over the seeds.

    Args:
        rows: those of a results.json, whose titles begin with the way of training.
    """
    tests = list(rows[0]["scores"])
    lines = [["distilled", *tests]]
    ways = {row["model"].partition(",")[0]: None for row in rows}
    for way in ways:
        runs = [row for row in rows if row["model"].partition(",")[0] == way]
        lines += [[run["model"], *(f"{run['scores'][test][0]:.3f}" for test in tests)] for run in runs]
        if len(runs) > 1:
            means = [sum(run["scores"][test][0] for run in runs) / len(runs) for test in tests]
            lines.append([f"{way}, mean", *(f"{mean:.3f}" for mean in means)])
    lines.insert(1, ["---", *("---:" for _ in tests)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
