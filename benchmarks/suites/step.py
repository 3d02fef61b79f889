"""Suite `step`: a whole distillation step by stages, with the models and batches of `minilm_kernels.distill`.

The stages are the teacher up to its layer L, the student, the loss with its gradient for Q, K and V, the backward
through the student, and the optimizer. Weights are random, because time does not depend on them.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import records
from benchmarks.measure.correctness import Oracle, guarded
from benchmarks.measure.memory import OutOfMemory, isolated, largest, memory_limit, peak_bytes
from benchmarks.measure.timed_loss import Result, TimedLoss
from benchmarks.measure.timing import intervals, stamp, summary, time_ms
from benchmarks.measure.workload import Inputs, Workload
from benchmarks.providers import PROVIDERS
from minilm_kernels.distill.batch import Batch
from minilm_kernels.distill.config import DistillConfig
from minilm_kernels.distill.gradients import GradientBuffer
from minilm_kernels.distill.models import LayerModel, TeacherStudent
from minilm_kernels.distill.optimizer import make_optimizer
from minilm_kernels.distill.packing import PADDING, Samples
from minilm_kernels.distill.step import student_qkv, teacher_qkv
from minilm_kernels.losses import QKV, MiniLMv2Loss
from minilm_kernels.presets import PRESETS
from minilm_kernels.students import preset_config, random_student, student_config

STAGES = ("teacher", "student", "loss", "backward", "optimizer")
SHAPES = {
    "cpu": ["minilmv2-l6-h384-bert-base:2x128"],
    "cuda": [
        f"minilmv2-{name}:256x512" for name in ("l6-h384-bert-base", "l6-h384-roberta-large", "l12-h384-roberta-large")
    ],
}
TINY = "tiny"  # a small model for trying out the suite
MASKS = ("none", "lengths", "packed")
RECIPE_TOKENS = 400_000 * 256 * 512  # the published MiniLMv2 recipe
# FLOP/s of dense matrix products with float32 sums, from NVIDIA's data sheets. On other devices, a product is measured.
_PEAK_FLOPS = {("H100", "bfloat16"): 989e12, ("H200", "bfloat16"): 989e12, ("A100", "bfloat16"): 312e12}
_WARM_UP = 2


class Models(NamedTuple):
    """Configs of student and teacher, the teacher's layer, and the relation heads of the loss."""

    student: Any
    teacher: Any
    layer: int
    heads: int


def models(name: str) -> Models:
    if name == TINY:
        student = student_config(preset_config("minilmv2-l6-h384-bert-base"), 2, 24, vocab_size=100)
        return Models(student, student_config(student, 3, 48, num_attention_heads=12), 2, 12)
    preset, student = PRESETS[name], preset_config(name)
    hidden = preset.teacher_hidden_size
    teacher = student_config(student, preset.teacher_layers, hidden, num_attention_heads=hidden // 64)
    return Models(student, teacher, preset.teacher_layer, preset.relation_heads)


class Setting(NamedTuple):
    """A step to measure. It can be pickled for the processes that find out whether it fits."""

    model: str
    workload: Workload  # the loss

    @classmethod
    def parse(cls, text: str, mask: str, dtype: str, device: str) -> Setting:
        match = re.fullmatch(r"(.*):([1-9]\d*)x([1-9]\d*)", text)
        if match is None or match[1] not in (*PRESETS, TINY):
            names = ", ".join((*PRESETS, TINY))
            raise ValueError(f"--shapes: this suite expects MODEL:BxS with MODEL one of {names}; got {text!r}")
        model, B, S = match[1], int(match[2]), int(match[3])
        if mask not in MASKS:
            raise ValueError(f"--masks: this suite takes {', '.join(MASKS)}, got {mask!r}")
        if model != TINY and PRESETS[model].method != "minilmv2":
            raise ValueError(f"--shapes: this suite measures the MiniLMv2 students, got {model!r}")
        student, teacher, _, heads = models(model)
        widths = (teacher.hidden_size // heads, student.hidden_size // heads)
        return cls(model, Workload(B, heads, S, *widths, "qq,kk,vv", mask, dtype, device))

    def with_batch(self, B: int) -> Setting:
        return self._replace(workload=self.workload.with_batch(B))


class Distillation:
    """Models, optimizer and one batch. A call runs a step and returns the milliseconds of each stage."""

    def __init__(self, setting: Setting, provider: str) -> None:
        self._workload = workload = setting.workload
        device = torch.device(workload.device)
        student_config, teacher_config, layer, heads = models(setting.model)
        teacher: Any = random_student(teacher_config).eval().requires_grad_(False).to(device)
        student: Any = random_student(student_config).train().to(device)
        pair = TeacherStudent(
            LayerModel(teacher, layer, None, "teacher"),
            LayerModel(student, -1, None, "student"),
            MiniLMv2Loss(heads),
            tokenizer=None,
        )
        samples = _samples(workload, student_config.vocab_size)
        self._batch = Batch(samples, device, packed=workload.mask == "packed")
        bf16 = workload.dtype == "bfloat16"
        self._teacher = partial(teacher_qkv, pair, self._batch, bf16=bf16)
        self._student = partial(student_qkv, pair, self._batch, bf16=bf16)
        recipe = DistillConfig(teacher="-", output_dir="-", student="-", text=("-",))
        self._max_grad_norm = recipe.max_grad_norm
        parameters = list(pair.trained().values())
        self._gradients = GradientBuffer(parameters)
        self.optimizer = make_optimizer(recipe, parameters)
        self.inputs = self._inputs(self._teacher(), self._student())
        self.loss = PROVIDERS[provider].build(self.inputs)
        self.tokens = int((samples.positions != PADDING).sum())
        student_flops = 3 * _forward_flops(student_config.hidden_size, student_config.num_hidden_layers, workload.S)
        self.flops_per_token = _forward_flops(teacher_config.hidden_size, layer, workload.S) + student_flops

    def _inputs(self, teacher: QKV, student: QKV) -> Inputs:
        teacher_heads, student_heads = (
            {name: x.detach().unflatten(-1, (self._workload.A, -1)) for name, x in zip("qkv", qkv, strict=True)}
            for qkv in (teacher, student)
        )
        mask = {name: x for name, x in self._batch.loss_arguments().items() if x is not None and x is not False}
        return Inputs(teacher_heads, student_heads, [("q", "q"), ("k", "k"), ("v", "v")], mask)

    def loss_and_gradients(self) -> Result:
        return TimedLoss(self.loss, [self._inputs(self._teacher(), self._student())])()

    def __call__(self) -> dict[str, float]:
        device = self._workload.device
        stamps = [stamp(device)]
        teacher = self._teacher()
        stamps.append(stamp(device))
        student = self._student()
        stamps.append(stamp(device))
        _, grads = TimedLoss(self.loss, [self._inputs(teacher, student)])()
        stamps.append(stamp(device))
        self._gradients.zero_()
        torch.autograd.backward(list(student), [g.flatten(-2) for g in grads])
        stamps.append(stamp(device))
        self._gradients.clip_(self._max_grad_norm)
        self.optimizer.step()
        stamps.append(stamp(device))
        return dict(zip(STAGES, intervals(stamps), strict=True))

    def check(self, record: records.Record) -> bool:
        """Check the loss against float64. Write the errors, and the status of a wrong loss, into the record."""
        workload, loss = self._workload, self.loss
        oracle = Oracle(self.inputs, 3 * self.inputs.sequences * workload.A * workload.S**2, workload.device)
        if oracle.part is not self.inputs:
            loss = PROVIDERS[record["provider"]].build(oracle.part)
            record["detail"]["checked_sequences"] = oracle.sequences
        return oracle.check(record, *TimedLoss(loss, [oracle.part])())


def _forward_flops(hidden: int, layer: int, S: int) -> int:
    """FLOPs per token up to the projections of `layer`: 12 hidden² weights per layer, and attention over S keys."""
    return (layer - 1) * (24 * hidden**2 + 4 * S * hidden) + 6 * hidden**2


def _samples(workload: Workload, vocabulary: int) -> Samples:
    """Samples of random tokens: full, with one document of random length, or packed with such documents."""
    B, S = workload.B, workload.S
    ids = np.random.default_rng(0).integers(5, vocabulary, (B, S), dtype=np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    lengths = iter(Workload(B * S, 1, S, 1, 1).lengths().tolist())
    for sample in positions if workload.mask != "none" else []:
        filled = 0
        while filled < S:
            length = next(lengths)
            if filled + length > S or (filled and workload.mask == "lengths"):
                sample[filled:] = PADDING
                break
            sample[filled : filled + length] = np.arange(length)
            filled += length
    return Samples(ids, positions)


def measure(options: argparse.Namespace) -> Iterator[records.Record]:
    """Each step at the requested batch; at the largest batch that fits with --largest, or if the batch does not fit."""
    for shape in options.shapes or SHAPES[options.device]:
        for dtype in options.dtypes:
            for mask in options.masks:
                setting = Setting.parse(shape, mask, dtype, options.device)
                for name in options.providers:
                    yield from _measure(setting, name, options)


def _measure(setting: Setting, name: str, options: argparse.Namespace) -> Iterator[records.Record]:
    record = _record(setting, name, options)
    yield record
    if record["status"] != "oom" and not options.largest:
        return
    B = setting.workload.B
    most = B - 1 if record["status"] == "oom" else 64 * B
    B = guarded(record, lambda: largest(partial(_fits, setting, name, options), B // 2, most))
    if B:
        yield _record(setting.with_batch(B), name, options, largest_batch=True)


def _fits(setting: Setting, name: str, options: argparse.Namespace, B: int) -> bool:
    try:
        _try(setting.with_batch(B), name, options)
    except (OutOfMemory, torch.OutOfMemoryError):
        return False
    finally:
        if setting.workload.device == "cuda":
            torch.cuda.empty_cache()
    return True


def _try(setting: Setting, name: str, options: argparse.Namespace) -> bool:
    """Run one step (on a CPU, in a new process). Return True if it fits."""
    if setting.workload.device == "cuda":
        return _run(setting, name, None)
    return isolated(_run, setting, name, options.memory, seconds=10 * options.timeout)


def _run(setting: Setting, name: str, limit: int | None) -> bool:
    with memory_limit(limit, setting.workload.device):
        Distillation(setting, name)()
    return True


def _record(setting: Setting, name: str, options: argparse.Namespace, largest_batch: bool = False) -> records.Record:
    detail = {"model": setting.model, "largest_batch": largest_batch}
    record = records.new("step", name, setting.workload, detail=detail)
    risky = setting.workload.device == "cpu" and PROVIDERS[name].dense
    if not risky or guarded(record, partial(_try, setting, name, options)):
        guarded(record, partial(_fill, record, setting, name, options))
    return record


def _fill(record: records.Record, setting: Setting, name: str, options: argparse.Namespace) -> None:
    device = setting.workload.device
    with memory_limit(options.memory, device):
        step = Distillation(setting, name)
    if not step.check(record):
        return
    with memory_limit(options.memory, device):
        for _ in range(_WARM_UP):
            step()
        record["peak_bytes"] = peak_bytes(step, device)
        runs: list[dict[str, float]] = []
        begin = time.perf_counter()
        while len(runs) < 5 or time.perf_counter() - begin < options.seconds:
            runs.append(step())
            if len(runs) == 2 and sum(runs[-1].values()) > 1e3 * options.timeout:
                raise TimeoutError(f"{sum(runs[-1].values()) / 1e3:.0f} s per step")
    record |= summary([sum(run.values()) for run in runs], device) | {"status": "ok", "clocks": records.clocks(device)}
    stages = {stage: statistics.median(run[stage] for run in runs) for stage in STAGES}
    rate = 1e3 * step.tokens / record["median_ms"]
    flops = step.flops_per_token * setting.workload.B * setting.workload.S
    peak, source = _peak_flops(device, setting.workload.dtype)
    record["detail"] |= {
        "stages_ms": stages,
        "tokens": step.tokens,
        "tokens_per_s": rate,
        "loss_share": stages["loss"] / sum(stages.values()),
        "model_flops": flops,
        "mfu": 1e3 * flops / record["median_ms"] / peak,
        "mfu_of": source,
        "recipe_hours": RECIPE_TOKENS / rate / 3600,
    }


@cache
def _peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """FLOP/s of the device in this dtype, and the source of the number."""
    for (chip, of), flops in _PEAK_FLOPS.items() if device == "cuda" else ():
        if chip in torch.cuda.get_device_name() and of == dtype:
            return flops, f"data sheet, {flops / 1e12:.0f} TFLOP/s"
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    rate = 2e3 * size**3 / statistics.median(time_ms(lambda: a @ a, device) for _ in range(10))
    return rate, f"measured matrix product, {rate / 1e12:.3g} TFLOP/s"
