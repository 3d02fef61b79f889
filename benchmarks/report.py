"""Tables from rows: what the README shows is made here, so no figure in it lacks a row."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

_COLUMNS = ("provider", "faster than eager", "peak memory, MiB", "error of the loss", "error of the gradient")


def read(file: Path) -> list[dict]:
    """Rows of a JSON lines file. Raises ValueError that names a line which is none."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: expected a JSON object, got {line[:60]!r}") from error
    return rows


def markdown(rows: list[dict]) -> str:
    """One table for each device, dtype and shape, in the order of the rows."""
    parts = []
    for (device, dtype, shape), group in groupby(rows, lambda row: (row["device"], row["dtype"], row["shape"])):
        members = list(group)
        eager = next((row["median_ms"] for row in members if row["provider"] == "eager" and "median_ms" in row), None)
        lines = [_COLUMNS, ("---", *["--:"] * (len(_COLUMNS) - 1)), *(_cells(row, eager) for row in members)]
        title = (
            f"B = {shape['B']}, A = {shape['A']}, S = {shape['S']}, widths {shape['d_t']} and {shape['d_s']}, {dtype}, "
            f"mask: {shape['mask']}. Loss and gradient, medians\nof one run on {device}, torch "
            f"{members[0]['versions']['torch']}:"
        )
        parts.append(title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _cells(row: dict, eager: float | None) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (f"`{row['provider']}`", row["status"], *["–"] * (len(_COLUMNS) - 2))
    ratio = "–" if eager is None else f"{eager / row['median_ms']:.1f} ×"
    return (
        f"`{row['provider']}`",
        ratio,
        f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['error_value']:.0e}",
        f"{row['error_grad']:.0e}",
    )
