"""Suite `train_step`: a whole training step of the distillation loop's parts, by stage, for each layout of its samples.

All settings of one model take turns, `--rounds` times or more. A step is reported by its fastest run, because other
work on the machine only adds time; the processor time of all threads stands beside the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import groupby, product
from typing import NamedTuple

import torch

from benchmarks.measure import records
from benchmarks.measure.correctness import TOLERANCE, guarded
from benchmarks.measure.layouts import LAYOUTS
from benchmarks.measure.memory import freed_memory_returned, memory_limit, peak_bytes
from benchmarks.measure.records import Record
from benchmarks.measure.timing import summary, time_ms
from benchmarks.measure.training import Parts, Setting, TrainStep
from benchmarks.providers import PROVIDERS
from minilm_kernels.distill.distributed import DistContext

RECIPE_TOKENS = 400_000 * 256 * 512  # the published MiniLMv2 recipe
SHAPES = {
    "cpu": ["minilmv2-l6-h384-bert-base:2x512"],
    "cuda": [f"minilmv2-l6-h384-bert-base:{B}x{S}" for B, S in ((1024, 128), (256, 512), (32, 4096), (16, 8192))],
}
# FLOP/s of dense matrix products with float32 sums, from NVIDIA's data sheets. On other devices, a product is measured.
_PEAK_FLOPS = {("H100", "bfloat16"): 989e12, ("H200", "bfloat16"): 989e12, ("A100", "bfloat16"): 312e12}
_LONGEST_PADDED = 512  # no document is longer, so that more columns would be padding only


class Timed(NamedTuple):
    """A step, its record, and its runs: milliseconds by stage, and of the processor."""

    step: TrainStep
    record: Record
    runs: list[tuple[dict[str, float], float]]


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """The records of every setting; settings of one model and dtype take turns."""
    found = []
    with DistContext(options.device) as dist:
        for model, settings in groupby(_settings(options), lambda setting: setting.model):
            parts = Parts(model, options.dropout, dist)
            for record in _measured(parts, list(settings), options):
                found.append(record)
                if dist.is_main:
                    yield record


def _settings(options: argparse.Namespace) -> list[Setting]:
    found = [
        Setting.parse(shape, layout, dtype, options.device)
        for shape in options.shapes or SHAPES[options.device]
        for dtype in options.dtypes
        for layout in options.layouts
    ]
    return sorted((s for s in found if _sensible(s)), key=lambda s: s.model)


def _sensible(setting: Setting) -> bool:
    return LAYOUTS[setting.layout].packing or setting.workload.S <= _LONGEST_PADDED


def _measured(parts: Parts, settings: Sequence[Setting], options: argparse.Namespace) -> Iterator[Record]:
    timed = []
    for setting, name in product(settings, options.providers):
        detail = {"model": setting.model, "layout": setting.layout, "processes": parts.dist.world_size}
        record = records.new("train_step", name, setting.workload, detail=detail)
        timed.append(Timed(TrainStep(parts, setting, name), record, []))
    # All steps are checked before the first of them changes the weights, so that they share a reference.
    for admit in (_check, _warm_up):
        for each in timed:
            guarded(each.record, partial(admit, each, options))
        yield from (each.record for each in timed if each.record["status"])
        timed = [each for each in timed if not each.record["status"]]
    begin = time.perf_counter()
    rounds = 0
    while timed and (rounds < max(2, options.rounds) or time.perf_counter() - begin < options.seconds):
        for each in timed:
            with freed_memory_returned():  # memory that the step before it freed
                pass
            each.runs.append(each.step().stages())
        rounds += 1
    for each in timed:
        _fill(each, options.device)
        yield each.record


def _check(timed: Timed, options: argparse.Namespace) -> None:
    step, record = timed.step, timed.record
    with memory_limit(options.memory if PROVIDERS[step.provider].dense else None, options.device):
        errors = step.check()
    record |= dict(zip(("error_value", "error_grad"), errors, strict=True))
    if not max(errors) < TOLERANCE[record["dtype"]]:  # NaN as well
        record |= {"status": "wrong", "reason": f"relative error {max(errors):.1e}"}


def _warm_up(timed: Timed, options: argparse.Namespace) -> None:
    with memory_limit(options.memory if PROVIDERS[timed.step.provider].dense else None, options.device):
        seconds = time_ms(timed.step, options.device) / 1e3
        if seconds > options.timeout:
            raise TimeoutError(f"{seconds:.0f} s per step")
        if options.peaks:
            timed.record["peak_bytes"] = peak_bytes(timed.step, options.device)


def _fill(timed: Timed, device: str) -> None:
    """Writes the results of all runs into the record."""
    step, record = timed.step, timed.record
    walls = [sum(stages.values()) for stages, _ in timed.runs]
    best = min(walls)
    flops, tokens = step.flops(), step.tokens
    peak, source = _peak_flops(device, record["dtype"])
    stages = timed.runs[walls.index(best)][0]
    record |= summary(walls, device) | {"status": "ok", "clocks": records.clocks(device)}
    record["detail"] |= {
        "best_ms": best,
        "processor_ms": min(processor for _, processor in timed.runs),
        "stages_ms": stages,
        "documents": step.documents,
        "tokens": tokens,
        "tokens_per_s": 1e3 * tokens / best,
        "loss_share": stages["loss"] / best,
        "model_flops": flops,
        "mfu": 1e3 * flops / best / peak,
        "mfu_of": source,
        "recipe_hours": RECIPE_TOKENS / (1e3 * tokens / best) / 3600,
        "gradient_elements": step.parts.buffer.gradients.numel(),
        "embedding_elements": step.parts.embeddings,
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
