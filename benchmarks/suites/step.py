"""Suite `step`: a whole distillation step by stages, with the models and batches of `minilm_kernels.distill`.

Teacher to its layer L, student, loss with its gradient for Q, K and V, backward through the student, optimizer. Weights
are random: time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.allocation import OutOfMemory, at_most, isolated, largest, peak_bytes
from benchmarks.candidates import guarded
from benchmarks.oracle import Oracle
from benchmarks.providers import PROVIDERS
from benchmarks.timing import summary
from benchmarks.workloads import Inputs, Workload
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.config import DistillConfig
from minilm_kernels.distill.models import LayerModel, TeacherStudent
from minilm_kernels.distill.optimizer import make_optimizer
from minilm_kernels.distill.packing import PADDING, Samples
from minilm_kernels.distill.step import GradientBuffer, student_qkv, teacher_qkv
from minilm_kernels.losses import MiniLMv2Loss
from minilm_kernels.students import PRESETS, preset_config, random_student, student_config

STAGES = ("teacher", "student", "loss", "backward", "optimizer")
SHAPES = {
    "cpu": ["minilmv2-l6-h384-bert-base:2x128"],
    "cuda": [
        f"minilmv2-{name}:256x512" for name in ("l6-h384-bert-base", "l6-h384-roberta-large", "l12-h384-roberta-large")
    ],
}
TINY = "tiny"  # a model of no use but to try the suite
MASKS = ("none", "lengths", "packed")
# Dense arithmetic in float32 sums, by NVIDIA's data sheets, FLOP/s. Others: a matrix product is measured.
_PEAKS = {("H100", "bfloat16"): 989e12, ("H200", "bfloat16"): 989e12, ("A100", "bfloat16"): 312e12}
RECIPE_TOKENS = 400_000 * 256 * 512  # the published MiniLMv2 recipe
_WARM_UP = 2


class Setting(NamedTuple):
    """One step to measure; picklable, for the processes that try what fits."""

    model: str
    B: int
    S: int
    mask: str
    dtype: str
    device: str

    @classmethod
    def parse(cls, text: str, mask: str, dtype: str, device: str) -> Setting:
        model, _, size = text.partition(":")
        numbers = size.split("x")
        if model not in (*PRESETS, TINY) or len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(
                f"--shapes: this suite expects MODEL:BxS, MODEL of {', '.join(PRESETS)}, {TINY}; got {text!r}"
            )
        if mask not in MASKS:
            raise ValueError(f"--masks: this suite takes {', '.join(MASKS)}, got {mask!r}")
        if PRESETS.get(model, PRESETS["minilmv2-l6-h384-bert-base"]).method != "minilmv2":
            raise ValueError(f"--shapes: this suite measures the MiniLMv2 students, got {model!r}")
        return cls(model, int(numbers[0]), int(numbers[1]), mask, dtype, device)


class Distillation:
    """Models, optimizer and one batch; calling it runs a step and returns the milliseconds of the stages."""

    def __init__(self, setting: Setting, provider: str) -> None:
        preset = PRESETS["minilmv2-l6-h384-bert-base" if setting.model == TINY else setting.model]
        config: Any = preset_config("minilmv2-l6-h384-bert-base" if setting.model == TINY else setting.model)
        layers, layer, heads = preset.teacher_layers, preset.teacher_layer, preset.relation_heads
        hidden, attention_heads = (1024, 16) if layers == 24 else (768, 12)
        if setting.model == TINY:
            config = student_config(config, 2, 24, vocab_size=100)
            layers, layer, heads, hidden = 3, 2, 12, 48
        teacher_config: Any = student_config(config, layers, hidden, num_attention_heads=attention_heads)
        device = torch.device(setting.device)
        teacher: Any = random_student(teacher_config).eval().requires_grad_(False).to(device)
        student: Any = random_student(config).train().to(device)
        teacher_model = LayerModel(teacher, layer, None, "teacher")
        student_model = LayerModel(student, -1, None, "student")
        self._models = TeacherStudent(teacher_model, student_model, MiniLMv2Loss(heads), None)
        self._setting, self._heads, self._provider = setting, heads, provider
        self.flops_per_token = _forward_flops(hidden, layer, setting.S) + 3 * _forward_flops(
            config.hidden_size, config.num_hidden_layers, setting.S
        )
        recipe = DistillConfig(teacher="-", output_dir="-", student="-", text=("-",))
        self._max_grad_norm = recipe.max_grad_norm
        parameters = list(self._models.trained().values())
        self._gradients = GradientBuffer(parameters)
        self._optimizer = make_optimizer(recipe, parameters)
        token_rows = _rows(setting, config.vocab_size)
        self.tokens = int((token_rows.positions != PADDING).sum())
        self._batch = Batch(token_rows, device, packed=setting.mask == "packed")
        teacher_qkv, student_qkv = self._teacher(), self._student()
        self.inputs = self._inputs(teacher_qkv, [x.detach() for x in student_qkv])
        self._loss = PROVIDERS[provider].build(self.inputs)

    def _teacher(self) -> list[Tensor]:
        return list(teacher_qkv(self._models, self._batch, bf16=self._setting.dtype == "bfloat16"))

    def _student(self) -> list[Tensor]:
        return list(student_qkv(self._models, self._batch, bf16=self._setting.dtype == "bfloat16"))

    def _inputs(self, teacher: list[Tensor], student: list[Tensor]) -> Inputs:
        teacher_heads, student_heads = (
            {name: x.unflatten(-1, (self._heads, -1)) for name, x in zip("qkv", side, strict=True)}
            for side in (teacher, student)
        )
        mask = {name: x for name, x in self._batch.loss_arguments().items() if x is not None and x is not False}
        return Inputs(teacher_heads, student_heads, [("q", "q"), ("k", "k"), ("v", "v")], mask)

    def loss(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients for the student's heads."""
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.student.items()}
        value = self._loss(inputs.teacher, leaves)
        return value.detach(), list(torch.autograd.grad(value, list(leaves.values())))

    def __call__(self) -> dict[str, float]:
        clock = _CudaClock() if self._setting.device == "cuda" else _WallClock()
        clock.mark()
        teacher = self._teacher()
        clock.mark()
        student = self._student()
        clock.mark()
        _, grads = self.loss(self._inputs(teacher, [x.detach() for x in student]))
        clock.mark()
        self._gradients.zero_()
        torch.autograd.backward(student, [g.flatten(-2) for g in grads])
        clock.mark()
        self._gradients.clip_(self._max_grad_norm)
        self._optimizer.step()
        clock.mark()
        return dict(zip(STAGES, clock.intervals(), strict=True))

    def oracle(self) -> Oracle:
        sequences, heads = self.inputs.sequences, self._heads
        return Oracle(self.inputs, 3 * sequences * heads * self._setting.S**2, self._setting.device)


class _WallClock:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(1e3 * time.perf_counter())

    def intervals(self) -> list[float]:
        return list(np.diff(self._marks))


class _CudaClock:
    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        self._marks.append(torch.cuda.Event(enable_timing=True))
        self._marks[-1].record()

    def intervals(self) -> list[float]:
        self._marks[-1].synchronize()
        return [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def _forward_flops(hidden: int, layer: int, S: int) -> int:
    """Of one token up to the projections of `layer`: 12 hidden² weights a layer, and attention over S keys."""
    return (layer - 1) * (24 * hidden**2 + 4 * S * hidden) + 6 * hidden**2


def _rows(setting: Setting, vocabulary: int) -> Samples:
    """Random tokens: full rows, one document of a drawn length a row, or rows filled with such documents."""
    B, S = setting.B, setting.S
    ids = np.random.default_rng(0).integers(5, vocabulary, (B, S), dtype=np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    if setting.mask == "none":
        return Samples(ids, positions)
    lengths = iter(Workload(B * S, 1, S, 1, 1).lengths().tolist())
    for row in positions:
        filled = 0
        while filled < S:
            length = next(lengths)
            if filled + length > S or (filled and setting.mask == "lengths"):
                row[filled:] = PADDING
                break
            row[filled : filled + length] = np.arange(length)
            filled += length
    return Samples(ids, positions)


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    for shape in options.shapes or SHAPES[options.device]:
        for dtype in options.dtypes:
            for mask in options.masks:
                setting = Setting.parse(shape, mask, dtype, options.device)
                for name in options.providers:
                    yield from _provider_rows(setting, name, options)


def _provider_rows(setting: Setting, name: str, options: argparse.Namespace) -> Iterator[rows.Row]:
    """The step at the batch asked for; where it does not fit, also at the largest batch that does."""
    row = _measured(setting, name, options)
    yield row
    if row["status"] != "oom" and not options.largest:
        return
    most = setting.B - 1 if row["status"] == "oom" else 64 * setting.B
    B = guarded(row, lambda: largest(lambda B: _fits(setting._replace(B=B), name, options), setting.B // 2, most))
    if B:
        yield _measured(setting._replace(B=B), name, options, largest_batch=True)


def _fits(setting: Setting, name: str, options: argparse.Namespace) -> bool:
    try:
        if setting.device == "cpu":
            isolated(_try, setting, name, options.memory, seconds=10 * options.cap)
        else:
            _try(setting, name, None)
    except (OutOfMemory, torch.OutOfMemoryError):
        return False
    finally:
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return True


def _try(setting: Setting, name: str, limit: int | None) -> None:
    with at_most(limit, setting.device):
        Distillation(setting, name)()


def _measured(setting: Setting, name: str, options: argparse.Namespace, largest_batch: bool = False) -> rows.Row:
    row = rows.new("step", name, setting.device, setting.dtype, "full", _shape(setting))
    row["detail"] = {"model": setting.model, "largest_batch": largest_batch}
    if setting.device == "cpu" and PROVIDERS[name].dense:
        guarded(row, lambda: isolated(_try, setting, name, options.memory, seconds=10 * options.cap))
        if row["status"]:
            return row
    guarded(row, lambda: _measure(row, setting, name, options))
    return row


def _measure(row: rows.Row, setting: Setting, name: str, options: argparse.Namespace) -> None:
    with at_most(options.memory, setting.device):
        step = Distillation(setting, name)
    oracle = step.oracle()
    with at_most(options.memory, setting.device):
        _check(row, step, oracle)
        del oracle
        if row["status"] == "wrong":
            return
        for _ in range(_WARM_UP):
            step()
        row["peak_bytes"] = peak_bytes(step, setting.device)
        runs: list[dict[str, float]] = []
        begin = time.perf_counter()
        while len(runs) < 5 or time.perf_counter() - begin < options.seconds:
            runs.append(step())
            if len(runs) == 2 and sum(runs[-1].values()) > 1e3 * options.cap:
                raise TimeoutError(f"{sum(runs[-1].values()) / 1e3:.0f} s a step")
    totals = [sum(run.values()) for run in runs]
    row |= summary(totals) | {"method": "events" if setting.device == "cuda" else "wall", "status": "ok"}
    row["clocks"] = rows.clocks(setting.device)
    stages = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    rate = 1e3 * step.tokens / row["median_ms"]
    peak, source = _peak(setting.device, setting.dtype)
    flops = step.flops_per_token * setting.B * setting.S
    row["detail"] |= {
        "stages_ms": stages,
        "tokens": step.tokens,
        "tokens_per_s": rate,
        "loss_share": stages["loss"] / sum(stages.values()),
        "model_flops": flops,
        "mfu": 1e3 * flops / row["median_ms"] / peak,
        "mfu_of": source,
        "recipe_hours": RECIPE_TOKENS / rate / 3600,
    }


def _check(row: rows.Row, step: Distillation, oracle: Oracle) -> None:
    value, grads = step.loss(oracle.part) if oracle.part is step.inputs else (None, [])
    if value is None:
        part = PROVIDERS[row["provider"]].build(oracle.part)
        leaves = {name: x.detach().requires_grad_() for name, x in oracle.part.student.items()}
        value = part(oracle.part.teacher, leaves)
        grads = list(torch.autograd.grad(value, list(leaves.values())))
        row["detail"]["checked_sequences"] = oracle.sequences
    errors, fault = oracle.fault(row["dtype"], value.detach(), grads)
    row |= errors
    if fault is not None:
        row |= {"status": "wrong", "reason": fault}


def _shape(setting: Setting) -> dict[str, Any]:
    heads = 12 if setting.model == TINY else PRESETS[setting.model].relation_heads
    hidden_s = 24 if setting.model == TINY else PRESETS[setting.model].hidden_size
    hidden_t = 48 if setting.model == TINY else 1024 if PRESETS[setting.model].teacher_layers == 24 else 768
    shape = {"B": setting.B, "A": heads, "S": setting.S, "d_t": hidden_t // heads, "d_s": hidden_s // heads}
    return shape | {"relations": "qq,kk,vv", "mask": setting.mask}


@cache
def _peak(device: str, dtype: str) -> tuple[float, str]:
    """FLOP/s that the device can do in this dtype, and where that is from."""
    if device == "cuda":
        for (chip, of), flops in _PEAKS.items():
            if chip in torch.cuda.get_device_name() and of == dtype:
                return flops, f"data sheet, {flops / 1e12:.0f} TFLOP/s"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(10):
        clock = _CudaClock() if device == "cuda" else _WallClock()
        clock.mark()
        a @ a
        clock.mark()
        times += clock.intervals()
    rate = 2e3 * size**3 / statistics.median(times)
    return rate, f"measured matrix product, {rate / 1e12:.3g} TFLOP/s"
