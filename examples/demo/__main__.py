"""`python -m examples.demo`: distil a real teacher on real text, and show what came of it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import MARKER, markers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns 0, 1 for an error, 2 for wrong options, 128 + signal number where a signal stopped it."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Distil MiniLM-L6 into three of its layers on Wikipedia text; compare before, after and teacher.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a student is trained for each")
    parser.add_argument("--max-steps", type=int, default=300, help="optimizer steps")
    begin, _ = markers.markers(MARKER)
    parser.add_argument("--update", type=Path, metavar="FILE", help=f"file that gets the table, below {begin}")
    options = parser.parse_args(argv)
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        parser.error(f"--seeds: expected different numbers of 0 or more, got {options.seeds}")
    if options.max_steps < 1:
        parser.error(f"--max-steps: expected 1 or more, got {options.max_steps}")
    try:
        if options.update:
            markers.check_markers(options.update, MARKER)
        from transformers.utils.logging import disable_progress_bar

        from .experiment import run  # with transformers and matplotlib: seconds that --help need not wait for

        disable_progress_bar()  # of loading and saving, which take no time here
        return run(options.output_dir, options.seeds, options.max_steps, options.update)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
