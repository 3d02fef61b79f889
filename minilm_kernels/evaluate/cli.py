"""`minilm-evaluate`: compares models on one table. torch is imported after the options are checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilm_kernels import __version__
from minilm_kernels._extras import optional_imports

from .tasks import TASKS, XNLI_LANGUAGES


def build_parser() -> argparse.ArgumentParser:
    """Creates the parser."""
    parser = argparse.ArgumentParser(
        prog="minilm-evaluate",
        description="Compare encoders: relation KL on eval text, sentence features, fine-tuning, size and speed.",
        epilog="Example: minilm-evaluate run/student --teacher google-bert/bert-base-uncased --text eval.txt "
        "--classification news.jsonl --static",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders, folders of finished runs, or names on the hub")
    add("--version", action="version", version=f"minilm-evaluate {__version__}")
    add("--titles", nargs="+", default=[], metavar="TITLE", help="names of the models in the table, in their order")
    add("--teacher", help="the teacher: the reference of speeds, and of the relation KL")
    add("--static", action="store_true", help="add static embeddings that model2vec makes of the teacher")
    add("--output-dir", type=Path, default=Path("evaluation"), help="folder of the results (default: evaluation)")
    add("--device", default=None, help="device; by default cuda if there is one, otherwise cpu")
    add("--max-seq-length", type=int, default=128, help="longer texts are truncated (default: 128)")
    add("--no-speed", dest="speed", action="store_false", help="measure no speed")

    kl = parser.add_argument_group("relation KL, as minilm-distill evaluates it; needs --teacher")
    kl.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text that no model was trained on")
    kl.add_argument("--distill-config", metavar="FILE", help="a run's settings.json, for its loss and layers")
    kl.add_argument("--relation-heads", type=int, help="number of relation heads, as in minilm-distill")

    frozen = parser.add_argument_group(
        "frozen features, on local files (.jsonl, .csv, .tsv, .parquet); the file's name is the name of the test"
    )
    frozen.add_argument(
        "--classification",
        nargs="+",
        default=[],
        metavar="FILE",
        help="columns text, label: accuracy of a probe",
    )
    frozen.add_argument(
        "--pairs", nargs="+", default=[], metavar="FILE",
        help="columns sentence1, sentence2, score: Spearman correlation of the cosine similarity",
    )  # fmt: skip
    frozen.add_argument(
        "--retrieval", nargs="+", default=[], metavar="FILE",
        help="columns query, answer: share of queries whose nearest answer is their own",
    )  # fmt: skip
    frozen.add_argument("--mteb", nargs="+", default=[], metavar="TASK", help="tasks of the package mteb")

    tuning = parser.add_argument_group("fine-tuning")
    tuning.add_argument("--fine-tune", action="store_true", help="also fine-tune on the files of --classification")
    tuning.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help=f"benchmarks from the hub: {', '.join(TASKS)}"
    )
    tuning.add_argument(
        "--task-data", type=Path, metavar="FOLDER", help="local copies: FOLDER/TASK/train.jsonl, .../validation.jsonl"
    )
    tuning.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run per seed (default: 0)")
    tuning.add_argument("--learning-rates", type=float, nargs="+", help="instead of the papers' grid")
    tuning.add_argument("--epochs", type=int, nargs="+", help="instead of the papers' grid")
    tuning.add_argument(
        "--xnli-languages", nargs="+", default=list(XNLI_LANGUAGES), metavar="LANGUAGE",
        help="languages of the test; training is in English",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `minilm-evaluate`.

    Args:
        argv: command-line arguments, by default those of the process.

    Returns:
        0 for success, 1 for an error, 130 if it was interrupted.

    Raises:
        SystemExit: `--help` (0), or invalid options (2), as in argparse.
    """
    parser = build_parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    try:
        with optional_imports("evaluate", "minilm-evaluate"):
            from .compare import compare
        return compare(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"minilm-evaluate: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minilm-evaluate: interrupted", file=sys.stderr)
        return 130


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with a message if options contradict each other."""

    def need(holds: Any, message: str) -> None:
        if not holds:
            parser.error(message)

    if options.titles:
        need(len(options.titles) == len(options.models),
             f"--titles: expected one for each of {len(options.models)} models, got {len(options.titles)}")  # fmt: skip
    need(options.teacher or not options.text, "--text: the relation KL needs --teacher")
    need(options.teacher or not options.static, "--static: static embeddings are made of --teacher")
    need(options.max_seq_length > 1, f"--max-seq-length: expected 2 or more, got {options.max_seq_length}")
    need(options.classification or not options.fine_tune, "--fine-tune: it needs files of --classification")
    unknown = sorted(set(options.tasks) - set(TASKS))
    need(not unknown, f"--tasks: unknown {', '.join(unknown)}; expected one of {', '.join(TASKS)}")
    unknown = sorted(set(options.xnli_languages) - set(XNLI_LANGUAGES))
    need(not unknown, f"--xnli-languages: unknown {', '.join(unknown)}; expected one of {', '.join(XNLI_LANGUAGES)}")
    need(len(set(options.seeds)) == len(options.seeds), f"--seeds: expected distinct numbers, got {options.seeds}")
    for name, least in (("seeds", 0), ("learning_rates", 0.0), ("epochs", 1)):
        values = getattr(options, name) or []
        need(all(value >= least for value in values), f"--{name.replace('_', '-')}: expected {least} or more")
    tests = [Path(file).stem for kind in ("classification", "pairs", "retrieval") for file in getattr(options, kind)]
    need(len(set(tests)) == len(tests), f"two test files have the same name, which names the test: {', '.join(tests)}")
    need(options.speed or options.text or tests or options.mteb or options.tasks, "no test: give files, or --tasks")
