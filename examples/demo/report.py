"""Formats the results of the demo as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

_FIGURES = {  # key of a result: (title of the line, decimals)
    "eval_kl": ("eval relation KL", 3),
    "eval_kl_qq": ("– Q-Q", 3),
    "eval_kl_kk": ("– K-K", 3),
    "eval_kl_vv": ("– V-V", 3),
    "bbc_accuracy": ("BBC accuracy", 3),
    "lee_r": ("Lee r", 3),
    "training_seconds": ("training, s", 0),
}

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Formats results as a Markdown table with a column per model and a line per figure.

    Losses are also given as a ratio to those of the first model.

    Args:
        rows: one mapping per model, with its title as `model` and its figures. The first is the student before
            training. Missing figures are shown as a dash.
    """
    lines = [["", *(row["model"] for row in rows)]]
    for name, (title, decimals) in _FIGURES.items():
        lines.append([title, *(_cell(row, name, decimals, rows[0]) for row in rows)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (widths[0]), *("-" * (width - 1) + ":" for width in widths[1:])])
    for line in lines:
        line[:] = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Row, name: str, decimals: int, before: Row) -> str:
    if row.get(name) is None:
        return "–"
    share = f" ({row[name] / before[name]:.2f} ×)" if name.startswith("eval") and row is not before else ""
    return f"{row[name]:.{decimals}f}{share}"


def section(record: Mapping[str, Any], arguments: str) -> str:
    """The table of a results.json, followed by its settings and the command that reproduces it."""
    settings, versions = record["settings"], record["versions"]
    layers = ", ".join(map(str, settings["copy_layers"]))
    lines = [
        table(record["rows"]),
        f"The student starts with layers {layers} of the teacher and is trained for {settings['max_steps']} steps",
        f"of {settings['total_batch_size']} × {settings['max_seq_length']} tokens,",
        f"with {settings['relation_heads']} relation heads and learning rate {settings['learning_rate']:g},",
        f"on {versions['threads']} CPU threads",
        f"(torch {versions['torch']}, transformers {versions['transformers']}).",
        f"`python -m examples.demo {arguments}` reproduces this table.",
    ]
    return "\n".join(lines)
