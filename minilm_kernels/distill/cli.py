"""`minilm-distill`: the command line of `distill`, generated from the fields of `DistillConfig`.

Nothing here imports torch before all options are read and checked.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import NoReturn

from minilm_kernels import __version__

from .config import DistillConfig, advice, default_of, flag, read_settings, show, shown
from .console import flush, say

_HELP = "minilm-distill --help lists the options"
_LONGEST = 4000  # characters of an error; other libraries' may be pages


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends with the error first, then the way to help, without pages of usage."""
        say(f"error: {message}\n{_HELP}")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """One argument an option; values stay text, which `DistillConfig` reads and checks."""
    parser = _Parser(
        prog="minilm-distill",
        description="Distil the self-attention relations of a teacher into a student (MiniLM, MiniLMv2).",
        epilog="Several processes: torchrun --nproc-per-node N -m minilm_kernels.distill OPTIONS.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of the package and of torch")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error too")
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
    """Runs the command line; an error is a message on standard error, with --debug after its traceback.

    Returns 0; 1 for an error, 2 for wrong options, 128 + signal number if stopped by one. --help and what cannot be
    parsed end in `SystemExit` of 0 and 2, as argparse has it.
    """
    debug, status = False, 2
    try:
        parser = build_parser()
        given, rest = parser.parse_known_args(argv)
        options = vars(given)
        debug = options.pop("debug", False)
        if rest:
            word = rest[0].partition("=")[0]
            parser.error(f"unknown option {shown(word)}; {advice(word, flag)}")
        if options.pop("version", False):
            print(f"minilm-distill {__version__}, torch {_torch_version()}")
            return 0
        file = options.pop("config", None)
        settings = {} if file is None else read_settings(file)
        config = DistillConfig.from_mapping({**settings, **options}, "options" if file is None else f"--config {file}")

        status = 1
        from .loop import distill  # imports torch and transformers: seconds

        result = distill(config)
        return 0 if result.stopped_by is None else 128 + result.stopped_by
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:
        if debug:
            with suppress(OSError, ValueError):
                traceback.print_exc()
        say(f"error: {_message(error)}")
        return status
    finally:
        flush(sys.stdout, sys.stderr)


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # imports sockets and mail, for --version alone

    try:
        return version("torch")
    except PackageNotFoundError:
        return "is not installed"


def _message(error: Exception) -> str:
    """The message of an error that `distill` promises; any other, in a line, with its type."""
    text = str(error)
    if not isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OSError)) or not text:
        text = f"{' '.join(f'{type(error).__name__}: {text}'.split())} (--debug shows where)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … (--debug shows all)"
