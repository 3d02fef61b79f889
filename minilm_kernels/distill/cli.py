"""`minilm-distill`: the command line of `distill`, generated from the fields of `DistillConfig`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields

from .config import DistillConfig, default_of, flag, read_settings, show


def build_parser() -> argparse.ArgumentParser:
    """One argument an option; values stay text, which `DistillConfig` reads and checks."""
    parser = argparse.ArgumentParser(
        prog="minilm-distill",
        description="Distil the self-attention relations of a teacher into a student (MiniLM, MiniLMv2).",
        epilog="Several processes: torchrun --nproc-per-node N -m minilm_kernels.distill OPTIONS.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with these options; the command line wins")
    for option in fields(DistillConfig):
        default = default_of(option)
        shown = "required" if default is MISSING else f"default: {'none' if default in (None, ()) else show(default)}"
        text = f"{option.metadata['help']} ({shown})".replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag(option.name), action=argparse.BooleanOptionalAction, help=text)
            continue
        choices = option.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else option.name.rpartition("_")[2].upper()
        parser.add_argument(flag(option.name), metavar=metavar, help=text, nargs=option.metadata["nargs"] or None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 1 for an error, 2 for wrong options, 128 + signal number if stopped by one."""
    options = vars(build_parser().parse_args(argv))
    file = options.pop("config", None)
    try:
        settings = {str(key).replace("-", "_"): value for key, value in (read_settings(file) if file else {}).items()}
        config = DistillConfig.from_mapping({**settings, **options}, f"--config {file}" if file else "options")
    except (ValueError, FileNotFoundError) as error:
        return _fail(error, 2)

    from .loop import distill  # imports transformers: seconds that --help need not wait for

    try:
        result = distill(config)
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        return _fail(error, 1)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _fail(error: Exception, status: int) -> int:
    print(f"minilm-distill: error: {error}", file=sys.stderr)
    return status
