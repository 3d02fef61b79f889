"""`python -m examples.demo.initialization`: compares the initializations of a narrower student by their eval loss."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from . import study

INITIALIZATIONS = ("random", "pca")
EVALUATIONS = 4  # after the first step; the columns of the table
SETTINGS: dict[str, Any] = {
    "student_num_hidden_layers": 3,
    "student_hidden_size": 192,  # half of the teacher's
    "relation_heads": 12,
    "dropout": 0.0,
    "max_seq_length": 128,
    "total_batch_size": 8,
    "learning_rate": 1e-3,
    "eval_samples": 64,
    "save_total_limit": 1,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Returns:
        0 for success, 1 for an error, and 128 + the signal number if a signal stopped it.
    """
    return study.main(
        "initialization",
        "Distill MiniLM-L6 into students of half its width, initialized at random and by PCA of its "
        "embeddings, and compare their evaluation loss.",
        300,
        lambda steps: "" if steps >= EVALUATIONS else f"{EVALUATIONS} or more",
        _compare,
        argv,
    )


def _compare(options: argparse.Namespace) -> str | int:
    from minilm_kernels.distill import DistillConfig, distill  # imports transformers, which takes seconds

    from . import assets

    teacher, text = assets.minilm_l6(), assets.wikipedia_text()
    losses: dict[tuple[str, int], dict[int, float]] = {}  # (initialization, seed) -> step -> eval loss
    for seed in options.seeds:
        for initialization in INITIALIZATIONS:
            print(f"Distilling with seed {seed}, {initialization}", file=sys.stderr)
            config = DistillConfig(
                teacher=str(teacher),
                output_dir=str(options.output_dir / f"{initialization}-{seed}"),
                text=(str(text.train),),
                eval_text=(str(text.evaluation),),
                student_init=initialization,
                max_steps=options.max_steps,
                eval_steps=max(1, options.max_steps // EVALUATIONS),
                seed=seed,
                resume_from_checkpoint=True,
                **SETTINGS,
            )
            result = distill(config)
            if result.stopped_by:
                return 128 + result.stopped_by
            records = map(json.loads, result.metrics.read_text(encoding="utf-8").splitlines())
            losses[initialization, seed] = {r["step"]: r["eval_loss"] for r in records if r["split"] == "eval"}
    return format_table(losses)


def format_table(losses: dict[tuple[str, int], dict[int, float]]) -> str:
    """A Markdown table of the eval losses, with a line per run, a column per evaluated step, and a line of means."""
    steps = sorted(set.intersection(*(set(run) for run in losses.values())))
    lines = [["initialization", "seed", *(f"step {step}" for step in steps)]]
    for initialization in dict.fromkeys(name for name, _ in losses):
        runs = [(str(seed), run) for (name, seed), run in losses.items() if name == initialization]
        mean = {step: sum(run[step] for _, run in runs) / len(runs) for step in steps}
        for seed, run in [*runs, ("mean", mean)]:
            lines.append([initialization, seed, *(f"{run[step]:.3f}" for step in steps)])
    lines.insert(1, ["---", *("---:" for _ in lines[0][1:])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
