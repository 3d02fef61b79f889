"""`python -m benchmarks report`: one HTML page, Markdown between markers, and plots, from rows alone."""

from __future__ import annotations

import argparse
import html
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.demo.markers import markers, update

from . import tables
from .rows import Row, read
from .tables import Table


class Section(NamedTuple):
    """A part of the report: a marker's name, its title, its tables, its figures by name."""

    title: str
    tables: Callable[[Sequence[Row]], list[Table]]
    figures: tuple[str, ...] = ()


SECTIONS: dict[str, Section] = {
    "loss": Section("Loss and gradient", tables.loss, ("roofline",)),
    "cases": Section("Lengths, masks and dtypes", tables.cases, ("time",)),
    "memory": Section("Memory", tables.memory, ("memory",)),
    "batch": Section("Largest batch", tables.batches, ("batch",)),
    "accuracy": Section("Accuracy", tables.accuracy, ("accuracy",)),
    "step": Section("A distillation step", tables.step),
    "inference": Section("Inference of the students", tables.inference),
}
RESULTS = Path(__file__).parent / "results"


def register(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="make tables and plots of rows", description=__doc__)
    parser.add_argument("rows", type=Path, nargs="*", default=[RESULTS], help="files of rows, or folders of such files")
    parser.add_argument(
        "--update", type=Path, nargs="+", default=[], metavar="FILE", help="Markdown files with markers"
    )
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the plots as PNG here; --update links them")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs no other file")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    found = read(options.rows)
    if not found:
        raise ValueError(f"rows: expected at least one row, found none in {', '.join(map(str, options.rows))}")
    if options.plots is not None:
        write_plots(found, options.plots)
    if options.html is not None:
        options.html.write_text(page(found), encoding="utf-8")
    for file in options.update:
        update_file(file, found, options.plots)
    if not options.update and options.html is None and options.plots is None:
        print("\n\n".join(f"## {SECTIONS[name].title}\n\n{text}" for name, text in sections(found).items()))


def sections(rows: Sequence[Row]) -> dict[str, str]:
    """Markdown of every section that has rows."""
    made = {name: section.tables(rows) for name, section in SECTIONS.items()}
    return {name: "\n\n".join(table.markdown() for table in parts) for name, parts in made.items() if parts}


def update_file(file: Path, rows: Sequence[Row], plots: Path | None) -> None:
    """Replace what stands between the markers of sections in `file`; a section without rows stays as it is.

    Raises FileNotFoundError or ValueError where the file has no marker at all.
    """
    text = file.read_text(encoding="utf-8")
    wanted = [name for name in SECTIONS if markers(name)[0] in text]
    if not wanted:
        raise ValueError(f"--update: expected a line such as {markers('loss')[0]} in {file}, found none")
    made = sections(rows)
    for name in wanted:
        if name not in made:
            continue
        images = []
        if plots is not None:
            folder = os.path.relpath(plots, file.parent)
            images = [
                f"![{_figures()[figure][1]}]({folder}/{figure}.png)"
                for figure in SECTIONS[name].figures
                if (plots / f"{figure}.png").exists()
            ]
        update(file, name, "\n\n".join([made[name], *images]))


def _figures():
    from .plots import FIGURES  # matplotlib takes a second

    return FIGURES


def write_plots(rows: Sequence[Row], folder: Path) -> None:
    """Every figure that has rows; one that has none is removed."""
    from .plots import draw, png

    folder.mkdir(parents=True, exist_ok=True)
    for name in _figures():
        figure = draw(name, rows)
        if figure is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        else:
            png(figure, folder / f"{name}.png")


_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
nav a { margin-right: 1rem; display: inline-block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 3rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; } pre { overflow-x: auto; font-size: 11px; }
"""


def page(rows: Sequence[Row]) -> str:
    """HTML with inline styles and SVG: nothing is loaded from anywhere."""
    from .plots import draw, svg

    body = []
    for name, section in SECTIONS.items():
        parts = [table.html() for table in section.tables(rows)]
        if not parts:
            continue
        for figure_name in section.figures:
            figure = draw(figure_name, rows)
            if figure is not None:
                parts.append(f"<figure>{svg(figure)}</figure>")
        body.append((name, section.title, "\n".join(parts)))
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in body)
    content = "\n".join(f'<section id="{name}"><h2>{title}</h2>\n{text}</section>' for name, title, text in body)
    lines = html.escape("\n".join(json.dumps(row) for row in rows))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>minilm_kernels: measurements</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>minilm_kernels: measurements</h1>
<p>Made by <code>python -m benchmarks report</code> of {len(rows)} rows, which stand at the end of this page.
Errors are relative, against float64.</p>
<nav>{links}</nav>
{content}
<h2>Rows</h2>
<details><summary>{len(rows)} JSON lines</summary><pre>{lines}</pre></details>
</body>
</html>
"""
