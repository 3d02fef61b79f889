"""Builds every model type of the installed transformers small, and checks its extraction and recording.

python -m tests.architectures                                       all types; fails if values are wrong
python -m tests.architectures bert modernbert                       these types
python -m tests.architectures --sample 40 --seed 3                  any forty
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


def scan(types: list[str], jobs: int = 1, timeout: int = 120, progress: bool = True) -> list[dict[str, Any]]:
    """The rows of model types. Each type has a process of its own, so that a crash or a hang costs its row alone."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    context = multiprocessing.get_context("fork")
    waiting, running, rows = deque(types), list[tuple[str, Any, Connection]](), list[dict[str, Any]]()
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
                rows += receiver.recv()
            except EOFError:
                process.join()
                reason = f"the process ended with status {process.exitcode}"
                rows.append({"model_type": model_type, "folder": folder(model_type), "reasons": {"build": reason}})
            process.join()
            running.remove(entry)
            if progress:
                print(f"{len(types) - len(waiting) - len(running)}/{len(types)} {model_type}", file=sys.stderr)
    return sorted(rows, key=lambda row: (row["folder"], row["model_type"]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures")
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--sample", type=int, help="check so many types")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for each type")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--update", type=Path, help="write the page to this file")
    options = parser.parse_args()
    types = options.types or model_types()
    if options.sample:
        types = sorted(random.Random(options.seed).sample(types, options.sample))
    start = time.monotonic()
    rows = scan(types, options.jobs, options.timeout)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.update:
        options.update.write_text(page(rows))
    print(f"{summary(rows)} {time.monotonic() - start:.0f} s")
    for row in wrong(rows):
        print(row["model_type"], row.get("stack", ""), row["reasons"])
    return 1 if wrong(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
