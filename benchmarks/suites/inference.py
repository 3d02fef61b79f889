"""Suite `inference`: the speed of the published students relative to the 12 × 768 base model, as in the papers."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from benchmarks.measure import records
from benchmarks.measure.correctness import TOLERANCE, guarded, relative
from benchmarks.measure.timing import first_run, interleaved, summary
from benchmarks.measure.workload import Workload
from minilm_kernels.presets import PRESETS
from minilm_kernels.students import parameter_count, random_student, student_config

SHAPES = {"cpu": ["4x128"], "cuda": ["32x128", "32x512"]}
BASE = (12, 768)


def students() -> dict[tuple[int, int], tuple[float, int | None]]:
    """(layers, hidden size) -> published speedup and millions of parameters, for students with BERT's vocabulary."""
    found: dict[tuple[int, int], tuple[float, int | None]] = {BASE: (1.0, None)}
    for preset in PRESETS.values():
        if preset.family == "bert":
            found[preset.num_hidden_layers, preset.hidden_size] = (preset.speedup, preset.million_parameters)
    return dict(sorted(found.items(), key=lambda student: student[1][0]))


class _Model:
    """A model and one batch, timed like a TimedLoss; attention runs in PyTorch's fused kernels."""

    def __init__(self, layers: int, workload: Workload) -> None:
        self.config = student_config(AutoConfig.for_model("bert"), layers, 12 * workload.d_s)
        self.model: Any = random_student(self.config).eval().to(workload.device, getattr(torch, workload.dtype))
        drawn = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, self.config.vocab_size, (workload.B, workload.S), generator=drawn)
        self.ids = self.ids.to(workload.device)

    def prepare(self) -> _Model:
        return self

    def __call__(self) -> Tensor:
        return self._last_hidden(self.model, self.ids)

    @torch.inference_mode()
    def _last_hidden(self, model: Any, ids: Tensor) -> Tensor:
        return model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    def error(self) -> float:
        """Relative error of the last hidden states of one sequence, against the same weights in float64."""
        exact = copy.deepcopy(self.model).double()
        got, expected = (self._last_hidden(model, self.ids[:1]) for model in (self.model, exact))
        return relative(got, expected.double())


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    for shape in options.shapes or SHAPES[options.device]:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if match is None:
            raise ValueError(f"--shapes: this suite expects BxS such as 8x128, got {shape!r}")
        for dtype in options.dtypes:
            yield from _measure(int(match[1]), int(match[2]), dtype, options)


def _measure(B: int, S: int, dtype: str, options: argparse.Namespace) -> Iterator[records.Record]:
    device = options.device
    made: dict[str, records.Record] = {}
    models: dict[str, Any] = {}
    for (layers, hidden), (speedup, millions) in students().items():
        name = f"{layers}x{hidden}"
        workload = Workload(B, 12, S, hidden // 12, hidden // 12, dtype=dtype, device=device)
        shape = workload.shape() | {"d_t": None, "relations": None}
        record = made[name] = records.new("inference", name, workload, "forward", shape=shape)
        model = guarded(record, partial(_Model, layers, workload))
        if model is None:
            continue
        record["detail"] = {
            "published_speedup": speedup,
            "published_million_parameters": millions,
            "parameters": parameter_count(model.config),
            "tokens": B * S,
        }
        error = guarded(record, model.error)
        if error is not None and guarded(record, partial(first_run, model, device)) is not None:
            right = error < TOLERANCE[dtype]
            record |= {"error_value": error, "status": "ok" if right else "wrong"}
            if right:
                models[name] = model
    times = interleaved(models, device, options.seconds)
    clocks = records.clocks(device)
    for name in models:
        made[name] |= summary(times[name], device) | {"clocks": clocks}
    yield from made.values()
