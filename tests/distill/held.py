"""Runs of `minilm-distill` that wait for the test that watches them, which a busy machine may hold up for longer."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from minilm_kernels.distill import cli, loop
from minilm_kernels.distill.signals import StopSignals


def main(step: int, released: Path | None = None) -> None:
    """`minilm-distill` with the words of the command line. After `step` steps it waits for a signal, or for a file."""
    train, take_step = loop.TrainingLoop.train, loop.TrainingLoop._step

    def noted(run: Any, signals: StopSignals) -> None:
        run.stop = signals
        train(run, signals)

    def held(run: Any) -> None:
        while run.state.step == step and not run.stop.received and not (released and released.exists()):
            time.sleep(0.005)
        take_step(run)

    loop.TrainingLoop.train, loop.TrainingLoop._step = noted, held  # type: ignore[method-assign]
    sys.exit(cli.main(sys.argv[1:]))
