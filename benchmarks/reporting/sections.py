"""The sections of a report: Markdown between markers, plots in files, and a page that needs no other file."""

from __future__ import annotations

import html
import json
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import toml_data
from examples.demo.markers import markers, update

from . import figures
from .tables import Declared, Records, Table


class Section(NamedTuple):
    """A part of the report, for the place between the markers of its name."""

    name: str
    title: str
    table: Sequence[dict]  # arguments of `Declared`
    figures: Sequence[str] = ()

    def tables(self, records: Records) -> list[Table]:
        return [table for declared in self.table for table in Declared(**declared).tables(records)]


_REPORT = toml_data.load(Path(__file__).with_name("report.toml"))
SECTIONS = {section["name"]: Section(**section) for section in _REPORT["section"]}


def markdown(records: Records) -> dict[str, str]:
    """The Markdown of every section that has records."""
    made = {name: section.tables(records) for name, section in SECTIONS.items()}
    return {name: "\n\n".join(table.markdown() for table in parts) for name, parts in made.items() if parts}


def update_file(file: Path, records: Records, plots: Path | None) -> None:
    """Replace the text between the markers of sections in `file`; a section without records stays as it is.

    Raises FileNotFoundError or ValueError if the file has no marker of a section.
    """
    text = file.read_text(encoding="utf-8")
    wanted = [name for name in SECTIONS if markers(name)[0] in text]
    if not wanted:
        raise ValueError(f"--update: expected a line such as {markers('loss')[0]} in {file}, found none")
    made = markdown(records)
    for name in filter(made.__contains__, wanted):
        images = []
        for figure in SECTIONS[name].figures:
            if plots is not None and (plots / f"{figure}.png").exists():
                link = os.path.relpath(plots / f"{figure}.png", file.parent)
                images.append(f"![{figures.FIGURES[figure][1]}]({link})")
        update(file, name, "\n\n".join([made[name], *images]))


def write_plots(records: Records, folder: Path) -> None:
    """Write every figure that has records, and remove the others."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in figures.FIGURES:
        figure = figures.draw(name, records)
        if figure is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
        else:
            figures.png(figure, folder / f"{name}.png")


def _html(table: Table) -> str:
    def line(cells: Sequence[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{_text(cell)}</{kind}>" for cell in cells) + "</tr>"

    head, body = line(table.header, "th"), "\n".join(line(cells, "td") for cells in table.lines)
    content = f"<table><thead>{head}</thead>\n<tbody>{body}</tbody></table>"
    return f'<p>{_text(table.caption)}</p>\n<div class="wide">{content}</div>'


def _text(markdown: str) -> str:
    return html.escape(markdown).replace("`", "")


def page(records: Records) -> str:
    """An HTML page with inline styles and SVG, which loads nothing."""
    links, body = [], []
    for name, section in SECTIONS.items():
        parts = [_html(table) for table in section.tables(records)]
        if not parts:
            continue
        drawn = filter(None, (figures.draw(figure, records) for figure in section.figures))
        content = "\n".join([*parts, *(f"<figure>{figures.svg(figure)}</figure>" for figure in drawn)])
        links.append(f'<a href="#{name}">{section.title}</a>')
        body.append(f'<section id="{name}"><h2>{section.title}</h2>\n{content}</section>')
    lines = html.escape("\n".join(json.dumps(record) for record in records))
    template = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(count=len(records), links="".join(links), body="\n".join(body), lines=lines)
