"""`minilm-distill`: the command line of `distill`, generated from the fields of `DistillConfig`.

torch is imported after the options are parsed and checked, so that `--help` and errors appear at once.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from typing import Any, NoReturn

from minilm_kernels import __version__

from .config import DistillConfig, advice
from .config_values import default_of, flag, show, shown
from .console import flush, say
from .recipes import recipe_table

_HELP = "minilm-distill --help lists the options"
_LONGEST = 4000  # characters of an error message; messages of other libraries may fill pages


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Prints the error and how to get help, without the long usage text, and exits."""
        say(f"error: {message}\n{_HELP}")
        raise SystemExit(2)

    def print_help(self, file: Any = None) -> None:
        """Passes over a reader that has gone, as argparse does from Python 3.11 on."""
        with suppress(OSError):
            super().print_help(file)


def build_parser() -> argparse.ArgumentParser:
    """Creates a parser with one argument per option. Values remain text; `DistillConfig` converts and checks them."""
    parser = _Parser(
        prog="minilm-distill",
        description="Distill the self-attention relations of a teacher into a student (MiniLM, MiniLMv2).",
        epilog="Several GPUs: torchrun --nproc-per-node N -m minilm_kernels.distill OPTIONS. "
        "minilm-distill prepare OPTIONS only tokenizes the text, into --output-dir, which several runs then take as "
        "--tokens; the options are those of a run, and those of the student may be left out.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of the package and of torch")
    parser.add_argument("--debug", action="store_true", help="print the traceback of errors")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file with these options; command-line options take precedence",
    )
    for option in fields(DistillConfig):
        default = default_of(option)
        absent = default in (None, ())
        shown = (
            "required" if default is MISSING else f"default: {option.metadata['absent'] if absent else show(default)}"
        )
        text = f"{option.metadata['help']} ({shown})".replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag(option.name), action=argparse.BooleanOptionalAction, help=text)
            continue
        choices = option.metadata["choices"]
        metavar = "{" + ",".join(choices) + "}" if choices else option.name.rpartition("_")[2].upper()
        parser.add_argument(flag(option.name), metavar=metavar, help=text, nargs=option.metadata["nargs"] or None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `minilm-distill`. Errors are printed on standard error, with a traceback if `--debug` is given.

    Args:
        argv: command-line arguments, by default those of the process.

    Returns:
        0 for success, 1 for an error, 2 for invalid options, and 128 + the signal number for a run that was stopped by
        a signal.

    Raises:
        SystemExit: `--help` (0), or arguments that cannot be parsed (2), as in argparse.
    """
    debug, status = False, 2
    try:
        parser = build_parser()
        words = sys.argv[1:] if argv is None else list(argv)
        only_text = words[:1] == ["prepare"]
        given, rest = parser.parse_known_args(words[only_text:])
        options = vars(given)
        debug = options.pop("debug", False)
        if rest:
            word = rest[0].partition("=")[0]
            parser.error(f"unknown option {shown(word)}; {advice(word, flag)}")
        if options.pop("version", False):
            print(f"minilm-distill {__version__}, torch {_torch_version()}")
            return 0
        if options.get("recipe") == "list":
            print(recipe_table())
            return 0
        file = options.pop("config", None)
        settings = {}
        if file is not None:
            from .config_file import read_settings  # imports yaml

            settings = read_settings(file)
        given_options = {**settings, **options}
        if only_text and not given_options.keys() & {"recipe", "student", "copy_layers", "student_num_hidden_layers"}:
            given_options["copy_layers"] = "1"  # any student
        config = DistillConfig.from_mapping(given_options, "options" if file is None else f"--config {file}")

        status = 1
        if only_text:
            from minilm_kernels.distill import prepare  # imports torch and transformers, which takes seconds

            counts = prepare(config).counts
            print(
                f"minilm-distill: {config.output_dir} has {counts.documents} documents, {counts.tokens} tokens"
                + (f"; skipped bad documents: {counts.bad}" if counts.bad else "")
            )
            return 0
        from minilm_kernels.distill import distill  # as above

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
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and only --version needs it

    try:
        return version("torch")
    except PackageNotFoundError:
        return "is not installed"


def _message(error: Exception) -> str:
    """The message of an exception; exceptions that `distill` does not document get one line with their type."""
    text = str(error)
    if not isinstance(error, (ValueError, TypeError, RuntimeError, ImportError, OSError)) or not text:
        text = f"{' '.join(f'{type(error).__name__}: {text}'.split())} (--debug prints the traceback)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … (--debug prints all of it)"
