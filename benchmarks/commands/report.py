"""`python -m benchmarks report`: tables, plots and an HTML page, from records alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.measure.records import RESULTS, read
from benchmarks.reporting import sections


def register(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="make tables and plots from records", description=__doc__)
    add = parser.add_argument
    add("records", type=Path, nargs="*", default=[RESULTS], help="files of records, or folders of such files")
    add("--update", type=Path, nargs="+", default=[], metavar="FILE", help="Markdown files with markers to update")
    add("--plots", type=Path, metavar="FOLDER", help="write the plots there as PNG; --update links them")
    add("--html", type=Path, metavar="FILE", help="write a page that needs no other file")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    found = read(options.records)
    if not found:
        raise ValueError(f"records: expected one or more, found none in {', '.join(map(str, options.records))}")
    if options.plots is not None:
        sections.write_plots(found, options.plots)
    if options.html is not None:
        options.html.write_text(sections.page(found), encoding="utf-8")
    for file in options.update:
        sections.update_file(file, found, options.plots)
    if not options.update and options.html is None and options.plots is None:
        for name, text in sections.markdown(found).items():
            print(f"## {sections.SECTIONS[name].title}\n\n{text}\n")
