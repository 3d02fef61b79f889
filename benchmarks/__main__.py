"""Command line of the benchmarks; `python -m benchmarks --help` lists commands, docs/benchmarks.md explains them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which reads memory here, reports every start and stop

from . import compare, days, report, run, static_cost

# Each has `register(commands)`, which adds its parser with `set_defaults(main=...)`.
_COMMANDS = (run, report, compare, days, static_cost)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or what the command returned."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS:
        command.register(commands)
    options = parser.parse_args(arguments)
    try:
        return options.main(options) or 0
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
