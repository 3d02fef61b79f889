"""Tasks of the Massive Text Embedding Benchmark, through its own package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minilm_kernels._extras import optional_imports

from .encoders import Candidate


def get_tasks(names: Sequence[str]) -> list[Any]:
    """The named tasks.

    Raises:
        ImportError: mteb is not installed.
        ValueError: there is no such task.
    """
    with optional_imports("mteb", "--mteb"):
        import mteb
    try:
        return [mteb.get_task(name) for name in names]
    except KeyError as error:
        raise ValueError(f"--mteb: {error.args[0]}") from error


def main_scores(candidate: Candidate, tasks: Sequence[Any]) -> dict[str, float]:
    """The main score of each task, by its name, as mteb defines it. mteb gives no interval."""
    import mteb

    result = mteb.evaluate(candidate.encoder, list(tasks), cache=None, show_progress_bar=False)
    return {found.task_name: float(found.get_score()) for found in result.task_results}
