"""Suite `inference`: the published students against the 12 × 768 base, the papers' speed-up column measured."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks import rows
from benchmarks.candidates import guarded
from benchmarks.oracle import WRONG, relative
from benchmarks.timing import first_run, interleaved, summary
from minilm_kernels.students import PRESETS, parameter_count, random_student, student_config

SHAPES = {"cpu": ["4x128"], "cuda": ["32x128", "32x512"]}
BASE = (12, 768)


def students() -> dict[tuple[int, int], tuple[float, int | None]]:
    """(layers, hidden size): published speed-up and millions of parameters, of the students with BERT's vocabulary."""
    found: dict[tuple[int, int], tuple[float, int | None]] = {BASE: (1.0, None)}
    for preset in PRESETS.values():
        if preset.family == "bert":
            found[preset.num_hidden_layers, preset.hidden_size] = (preset.speedup, preset.million_parameters)
    return dict(sorted(found.items(), key=lambda student: student[1][0]))


class _Model:
    """A model and one batch; a step as `interleaved` takes it. Attention by PyTorch's fused kernels."""

    def __init__(self, layers: int, hidden: int, B: int, S: int, dtype: torch.dtype, device: str) -> None:
        self.config = student_config(AutoConfig.for_model("bert"), layers, hidden)
        self.model: Any = random_student(self.config).eval().to(device, dtype)
        self.ids = torch.randint(5, self.config.vocab_size, (B, S), generator=torch.Generator().manual_seed(0)).to(
            device
        )

    def prepare(self):
        return self

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        return self.model(self.ids, attention_mask=torch.ones_like(self.ids)).last_hidden_state

    def error(self) -> float:
        """Of the last hidden states of one sequence, against the same weights in float64."""
        exact = copy.deepcopy(self.model).double()
        one = self.ids[:1]
        with torch.inference_mode():
            states = [m(one, attention_mask=torch.ones_like(one)).last_hidden_state for m in (self.model, exact)]
        return relative(states[0], states[1].double())


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    for shape in options.shapes or SHAPES[options.device]:
        B, S = parse(shape)
        for dtype in options.dtypes:
            yield from _shape_rows(B, S, dtype, options)


def parse(shape: str) -> tuple[int, int]:
    numbers = shape.split("x")
    if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
        raise ValueError(f"--shapes: this suite expects BxS such as 8x128, got {shape!r}")
    return int(numbers[0]), int(numbers[1])


def _shape_rows(B: int, S: int, dtype: str, options: argparse.Namespace) -> Iterator[rows.Row]:
    made: dict[str, rows.Row] = {}
    models: dict[str, Any] = {}
    for (layers, hidden), (speedup, millions) in students().items():
        name = f"{layers}x{hidden}"
        shape = {"B": B, "A": 12, "S": S, "d_t": None, "d_s": hidden // 12, "relations": None, "mask": "none"}
        row = made[name] = rows.new("inference", name, options.device, dtype, "forward", shape)
        model = guarded(row, partial(_Model, layers, hidden, B, S, getattr(torch, dtype), options.device))
        if model is None:
            continue
        row["detail"] = {
            "published_speedup": speedup,
            "published_million_parameters": millions,
            "parameters": parameter_count(model.config),
            "tokens": B * S,
        }
        error = guarded(row, model.error)
        ran = guarded(row, partial(first_run, model, options.device))
        if error is not None and ran is not None:
            right = error < WRONG[dtype]
            row |= {"error_value": error, "status": "ok" if right else "wrong"}
            if right:
                models[name] = model
    times = interleaved(models, options.device, options.seconds)
    now = rows.clocks(options.device)
    for name in models:
        made[name] |= summary(times[name]) | {"method": "events" if options.device == "cuda" else "wall", "clocks": now}
    yield from made.values()
