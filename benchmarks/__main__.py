"""Measure, compare and report; docs/benchmarks.md explains the commands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler, which measures memory, logs each start

from . import ablation, static_cost
from .commands import compare, machine, plan, report, run, scale


class _Parser(argparse.ArgumentParser):
    """A command's parser, whose help shows the defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of the command, 0 for success."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for command in (run, report, compare, plan, scale, machine, ablation, static_cost):
        command.register(commands)
    options = parser.parse_args(arguments)
    try:
        return options.main(options) or 0
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
