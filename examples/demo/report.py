"""The demo's table, made from its result rows alone."""

from collections.abc import Mapping, Sequence
from typing import Any

_FIGURES = {  # result row: (line of the table, decimals)
    "heldout_kl": ("held-out relation KL", 3),
    "heldout_kl_qq": ("– Q-Q", 3),
    "heldout_kl_kk": ("– K-K", 3),
    "heldout_kl_vv": ("– V-V", 3),
    "bbc_accuracy": ("BBC accuracy", 3),
    "lee_r": ("Lee r", 3),
    "training_seconds": ("training, s", 0),
}

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown table: a column for each row's model, a line for each figure, losses also as a share of the first row's.

    Args:
        rows: `{"model": title of the column, figure: value, ...}`, the student before training first. A figure that a
            row lacks is a dash.
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
    share = f" ({row[name] / before[name]:.2f} ×)" if name.startswith("heldout") and row is not before else ""
    return f"{row[name]:.{decimals}f}{share}"


def section(record: Mapping[str, Any], arguments: str) -> str:
    """The table of a results.json with the settings it was made with and the command that makes it again."""
    settings, versions = record["settings"], record["versions"]
    layers = ", ".join(map(str, settings["copy_layers"]))
    lines = [
        table(record["rows"]),
        f"The student begins as layers {layers} of the teacher and trains for {settings['steps']} steps",
        f"of {settings['batch_size']} × {settings['max_seq_length']} tokens, with {settings['relation_heads']} relation heads",
        f"and learning rate {settings['lr']:g}, on {versions['threads']} CPU threads",
        f"(torch {versions['torch']}, transformers {versions['transformers']}).",
        f"`python -m examples.demo {arguments}` makes this table.",
    ]
    return "\n".join(lines)
