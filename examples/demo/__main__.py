"""`python -m examples.demo`: distill a real teacher on real text and compare the student with it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import MARKER, markers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo.

    Returns:
        0 for success, 1 for an error, 2 for invalid options, and 128 + the signal number if a signal stopped it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Distill MiniLM-L6 into three of its layers on Wikipedia text, and compare both models.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="folder for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds; one student is trained for each")
    parser.add_argument("--max-steps", type=int, default=200, help="number of optimizer steps")
    begin, _ = markers.markers(MARKER)
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help=f"Markdown file to write the table into, after {begin}"
    )
    options = parser.parse_args(argv)
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds: expected distinct numbers of 0 or more, got {options.seeds}")
    if options.max_steps < 1:
        parser.error(f"--max-steps: expected 1 or more, got {options.max_steps}")
    try:
        if options.update:
            markers.check_markers(options.update, MARKER)
        from transformers.utils.logging import disable_progress_bar

        from .experiment import run  # imports transformers and matplotlib, which takes seconds

        disable_progress_bar()  # loading and saving are fast here
        return run(options.output_dir, options.seeds, options.max_steps, options.update)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
