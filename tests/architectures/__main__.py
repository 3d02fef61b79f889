"""Builds every model type of the installed transformers small, and checks its extraction and recording.

python -m tests.architectures                                       all types; fails if values are wrong
python -m tests.architectures bert modernbert                       these types
python -m tests.architectures --sample 40 --seed 3                  any forty
python -m tests.architectures --rows build/architectures.jsonl      all types that are not in the file yet
python -m tests.architectures --update docs/architectures.md        all types, and the page
"""

import argparse
import json
import multiprocessing
import random
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from .check import check
from .page import page, summary, wrong
from .small_models import folder, model_types


def _child(model_type: str, pipe: Connection, timeout: int) -> None:
    signal.alarm(timeout)
    warnings.simplefilter("ignore")
    pipe.send(check(model_type))


def scan(types: list[str], jobs: int = 1, timeout: int = 60) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each model type, which has a process of its own: a crash or a hang costs its rows alone."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    context = multiprocessing.get_context("fork")
    waiting, running = deque(types), list[tuple[str, Any, Connection]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(waiting[0], sender, timeout))
            process.start()
            sender.close()
            running.append((waiting.popleft(), process, receiver))
        ended = multiprocessing.connection.wait([receiver for _, _, receiver in running])
        for entry in [entry for entry in running if entry[2] in ended]:
            model_type, process, receiver = entry
            try:
                rows = receiver.recv()
            except EOFError:
                process.join(timeout)
                late = process.exitcode == -signal.SIGALRM
                reason = f"takes more than {timeout} s" if late else f"process ended with status {process.exitcode}"
                rows = [{"model_type": model_type, "folder": folder(model_type), "reasons": {"build": reason}}]
            process.join(timeout)
            running.remove(entry)
            yield rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures")
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--sample", type=int, help="check so many types")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for each type")
    parser.add_argument("--rows", type=Path, help="keep rows in this file; types without a row in it are checked")
    parser.add_argument("--update", type=Path, help="write the page to this file")
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    if options.rows and options.rows.exists():
        found = {rows[0]["model_type"]: rows for rows in map(json.loads, options.rows.read_text().splitlines())}
    types = options.types or [name for name in model_types() if name not in found]
    if options.sample:
        types = sorted(random.Random(options.seed).sample(types, options.sample))
    start = time.monotonic()
    for i, rows in enumerate(scan(types, options.jobs, options.timeout)):
        found[rows[0]["model_type"]] = rows
        print(f"{i + 1}/{len(types)} {rows[0]['model_type']}", file=sys.stderr)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(rows) + "\n")
    all_rows = [row for name in sorted(found) for row in found[name]]
    if options.update:
        options.update.write_text(page(all_rows))
    print(f"{summary(all_rows)} {time.monotonic() - start:.0f} s")
    for row in wrong(all_rows):
        print(row["model_type"], row.get("stack", ""), row["reasons"])
    return 1 if wrong(all_rows) else 0


if __name__ == "__main__":
    sys.exit(main())
