"""The results as a Markdown table with a row per model, as JSON, and as a plot of quality against speed."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import minilm_kernels

from .score import Score
from .speed import Speed

KL = "relation KL"


@dataclass
class Row:
    """The figures of one model.

    Attributes:
        title: name of the model.
        parameters: number of its parameters.
        scores: test to score. All are better if higher, except for `KL`.
        details: further figures for the JSON file.
        notes: reasons for missing figures.
    """

    title: str
    parameters: int
    speed: Speed | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def quality(self, tests: Sequence[str]) -> float | None:
        """The mean score over tests; None without tests, or if one is missing."""
        found = [self.scores[test].value for test in tests if test in self.scores]
        return sum(found) / len(found) if found and len(found) == len(tests) else None


def quality_tests(rows: Sequence[Row]) -> list[str]:
    """The tests that every row has, other than `KL`."""
    return [test for test in _tests(rows) if test != KL and all(test in row.scores for row in rows)]


def table(rows: Sequence[Row], reference: Row | None) -> str:
    """A Markdown table with a row per model.

    Args:
        rows: the models.
        reference: the model to which speeds are compared, usually the teacher.
    """
    tests = _tests(rows)
    timed = any(row.speed for row in rows)
    against = f"speed-up over {reference.title}" if reference else "speed-up"
    titles = ["model", "parameters", *(["ms a text", "tokens/s", against] if timed else []), *tests]
    lines = [titles]
    for row in rows:
        cells = [row.title, f"{row.parameters / 1e6:.1f}M"]
        if timed:
            cells += _speed(row.speed, reference.speed if reference else None)
        lines.append([*cells, *(_score(row.scores.get(test)) for test in tests)])
    lines.insert(1, ["---", *["---:"] * (len(titles) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _tests(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(test for row in rows for test in row.scores))


def _speed(speed: Speed | None, reference: Speed | None) -> list[str]:
    if speed is None:
        return ["–"] * 3
    ratio = f"{speed.tokens_per_second / reference.tokens_per_second:.1f} ×" if reference else "–"
    return [f"{speed.milliseconds:.1f}", f"{speed.tokens_per_second:,.0f}", ratio]


def _score(score: Score | None) -> str:
    if score is None or math.isnan(score.value):
        return "–"
    interval = "" if math.isnan(score.low) else f" [{score.low:.3f}, {score.high:.3f}]"
    return f"{score.value:.3f}{interval}"


def write(rows: Sequence[Row], reference: Row | None, folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Writes results.md, results.json and, with speeds and tests, quality.png. Returns their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {
        "minilm_kernels": minilm_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    record = {
        "settings": settings,
        "versions": versions,
        "rows": [
            {
                "model": row.title,
                "parameters": row.parameters,
                **(row.speed._asdict() if row.speed else {}),
                "scores": {test: _finite(score) for test, score in row.scores.items()},
                **row.details,
                "notes": row.notes,
            }
            for row in rows
        ],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(table(rows, reference), encoding="utf-8")
    files = [folder / "results.md", folder / "results.json"]
    tests = quality_tests(rows)
    if tests and all(row.speed for row in rows):
        plot(rows, tests, folder / "quality.png")
        files.append(folder / "quality.png")
    return files


def _finite(score: Score) -> list[float | None]:
    return [None if math.isnan(value) else value for value in score]


def plot(rows: Sequence[Row], tests: Sequence[str], file: Path) -> None:
    """Plots the mean score over the tests against the throughput of each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for row in rows:
        quality = row.quality(tests)
        assert row.speed is not None
        assert quality is not None
        points = axes.scatter(row.speed.tokens_per_second, quality, s=30 + 2 * row.parameters / 1e6)
        axes.annotate(
            f"{row.title}\n{row.parameters / 1e6:.1f}M",
            (row.speed.tokens_per_second, quality),
            xytext=(0, 8),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            color=points.get_facecolor()[0],
        )
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.25)
    axes.set_xlabel("tokens per second (log scale)")
    axes.set_ylabel(f"mean of {', '.join(tests)}" if len(tests) < 4 else f"mean of {len(tests)} tests")
    axes.set_title("Quality against speed; area: parameters", fontsize=10)
    axes.grid(alpha=0.3)
    figure.savefig(file)
