"""The command line of a comparison of several runs, which ends with a table."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import markers

Compare = Callable[[argparse.Namespace], "str | int"]


def main(
    name: str,
    description: str,
    steps: int,
    steps_problem: Callable[[int], str],
    compare: Compare,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a comparison, prints its table, and writes it into the Markdown file of `--update`.

    Args:
        name: that of the module, of the table's markers, and of the folder of the runs.
        steps: default of `--max-steps`.
        steps_problem: which numbers of steps were expected; empty if the given one is good.
        compare: runs the comparison. Returns the table, or the exit status of a run that failed.

    Returns:
        0 for success, 1 for an error, and 128 + the signal number if a signal stopped it.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.demo.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path(f"{name}-output"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds; two runs for each")
    parser.add_argument("--max-steps", type=int, default=steps, help="number of optimizer steps per student")
    begin, _ = markers.markers(name)
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help=f"Markdown file to write the table into, after {begin}"
    )
    options = parser.parse_args(argv)
    if problem := steps_problem(options.max_steps):
        parser.error(f"--max-steps: expected {problem}, got {options.max_steps}")
    try:
        if options.update:
            markers.check_markers(options.update, name)
        table = compare(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(table, int):
        return table
    print(table)
    if options.update:
        words = [f"--seeds {' '.join(map(str, options.seeds))}", f"--max-steps {options.max_steps}"]
        command = f"python -m examples.demo.{name} {' '.join(words)} --update {options.update}"
        markers.update(options.update, name, f"{table}\n`{command}`\nreproduces this table.")
    return 0
