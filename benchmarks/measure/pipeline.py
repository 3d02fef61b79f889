"""Steps of the training loop with its input pipeline, and on data that is ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.loop import TrainingLoop
from minilm_kernels.distill.prefetch import STEPS_AHEAD, PreparedStep
from minilm_kernels.distill.stages import stages
from minilm_kernels.students import random_student

from . import corpus
from .timing import time_ms
from .training import ModelPair

# Steps of a block. More than the loop prepares ahead, so that a block with the pipeline waits for it.
BLOCK = 3 * STEPS_AHEAD


class Runs(NamedTuple):
    """Milliseconds of a step of each block, by wall clock (CUDA: device) and processor."""

    wall: list[float]
    processor: list[float]


def folder_of(folder: Path, pair: ModelPair, size: int) -> None:
    """Writes the models, their tokenizer and about `size` bytes of text to a folder."""
    for name, config, seed in (("teacher", pair.teacher, 0), ("student", pair.student, 1)):
        random_student(config, seed=seed).save_pretrained(folder / name)
        corpus.tokenizer(pair.student.vocab_size).save_pretrained(folder / name)
    corpus.write(folder / "text.txt", size, pair.student.vocab_size)


def settings_of(folder: Path, pair: ModelPair, output: str) -> dict[str, Any]:
    """The arguments of `DistillConfig` for a run of this folder, with its output folder."""
    (folder / output).mkdir(exist_ok=True)
    paths = {name: str(folder / name) for name in ("teacher", "student")} | {"output_dir": str(folder / output)}
    return {**paths, "text": [str(folder / "text.txt")], "relation_heads": pair.heads, "teacher_layer": pair.layer}


class LoopSteps:
    """Steps of the training loop, with its pipeline and again on the same data, which is ready then.

    The learning rate is so small that both have the same loss.
    """

    def __init__(self, config: DistillConfig, dist: DistContext) -> None:
        (stage,) = stages(config)
        self.loop = TrainingLoop(stage, dist)
        self.loop.models.student.extractor.train()
        self._device = dist.device.type

    def close(self) -> None:
        self.loop.close()

    def block(self, with_pipeline: Runs, prepared: Runs) -> float:
        """Runs a block of steps both ways. Returns the largest relative difference of their losses."""
        loop, own = self.loop, self.loop._prepared
        data: list[PreparedStep] = []

        def keep() -> PreparedStep:
            data.append(own())
            return data[-1]

        try:
            loop._prepared = keep  # type: ignore[method-assign]
            self._timed(loop._step, with_pipeline)
            waiting = iter(data)
            loop._prepared = lambda: next(waiting)  # type: ignore[method-assign]
            self._timed(loop._step, prepared)
        finally:
            loop._prepared = own  # type: ignore[method-assign]
            loop.state.step -= BLOCK
        losses = torch.stack(loop.state.window)[:, :-1].sum(1)  # without the norm of the gradient
        loop.state.window.clear()
        return float(((losses[:BLOCK] - losses[BLOCK:]).abs() / losses[:BLOCK]).max())

    def _timed(self, step: Callable[[], None], runs: Runs) -> None:
        def steps() -> None:
            for _ in range(BLOCK):
                step()

        begin = time.process_time()
        runs.wall.append(time_ms(steps, self._device) / BLOCK)
        runs.processor.append(1e3 * (time.process_time() - begin) / BLOCK)
