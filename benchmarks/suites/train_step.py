"""Suite `train_step`: a whole training step of the distillation loop's parts, by stage, for each layout of its samples.

All settings of one model take turns, `--rounds` times or more. A step is reported by its fastest run, because other
work on the machine only adds time; the processor time of all threads stands beside the wall clock.
"""

from __future__ import annotations

import argparse
import sys
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
# Those of one and four samples are parts of the estimates of `scale`.
ACCEPTANCE = ["small:16x512", "small:2x4096:packed", "small:1x8192:packed", "small:1x512:packed", "small:4x512:packed"]
_LONGEST_PADDED = 512  # no document is longer, so that more columns would be padding only


class Timed(NamedTuple):
    """A step, its record, and its runs: milliseconds by stage, and of the processor."""

    step: TrainStep
    record: Record
    runs: list[tuple[dict[str, float], float]]


class Line(NamedTuple):
    """A line of the acceptance: a ratio by the fastest runs and by processor time, and its bar."""

    name: str
    wall: float | None
    processor: float | None
    bar: float
    at_least: bool = False

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        values = {"wall clock": self.wall, "processor": self.processor}
        shown = [f"{value:.3f} by {name} ({self._word(value)})" for name, value in values.items() if value is not None]
        return f"{self.name}: {', '.join(shown) or 'not measured'}; {sign} {self.bar:g}"

    def _word(self, value: float) -> str:
        return "met" if (value >= self.bar if self.at_least else value <= self.bar) else "missed"


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """The records of every setting; settings of one model take turns."""
    if options.preset is None:
        yield from _steps(options)
        return
    chosen = {"shapes": ACCEPTANCE, "peaks": False, "timeout": 300.0, "seconds": 30.0, "rounds": max(6, options.rounds)}
    vars(options).update(chosen)
    from . import data

    found = []
    for record in _steps(options):
        found.append(record)
        yield record
    vars(options).update({"shapes": None, "text": 10**9})
    for record in data.measure(options):
        found.append(record)
        yield record
    print("\n".join(map(str, acceptance(found))), file=sys.stderr, flush=True)


def acceptance(found: Sequence[Record]) -> list[Line]:
    """The acceptance lines from the records of the preset."""
    by_size = sorted((r for r in found if r["suite"] == "train_step"), key=lambda r: r["shape"]["B"])
    steps = {(r["detail"]["layout"], r["shape"]["S"]): r for r in by_size}  # the largest batch of each
    rows = {r["provider"]: r for r in found if r["suite"] == "data" and r["status"] == "ok"}

    def line(name: str, one: tuple[str, int], other: tuple[str, int], bar: float, at_least: bool = False) -> Line:
        pair = [steps[key] for key in (one, other) if key in steps and steps[key]["status"] == "ok"]
        times = [[r["detail"][key] / r["detail"]["tokens"] for key in ("best_ms", "processor_ms")] for r in pair]
        wall, processor = (a / b for a, b in zip(*times, strict=True)) if len(times) == 2 else (None, None)
        return Line(name, wall, processor, bar, at_least)

    base = ("packed", 512)
    lines = [
        line("S = 512, packed / dense", base, ("dense", 512), 1.0),
        line("S = 512, padded / packed", ("padded", 512), base, 1.5, at_least=True),
        line("S = 512, padded and sorted by length / packed", ("sorted", 512), base, 1.0, at_least=True),
        *(line(f"packed, S = {S} / 512", ("packed", S), base, 1.15) for S in (4096, 8192)),
    ]
    loop, prepared, tokenizer = (rows.get(name) for name in ("loop", "prepare", "tokenizer"))
    wall, processor = (1 + loop["detail"][key] if loop else None for key in ("overhead", "processor_overhead"))
    lines.append(Line("step with the pipeline / on prepared data", wall, processor, 1.03))
    keys = ("tokens_per_s", "tokens_per_processor_s")
    rates = [[r["detail"][key] for key in keys] for r in (prepared, tokenizer) if r]
    wall, processor = (a / b for a, b in zip(*rates, strict=True)) if len(rates) == 2 else (None, None)
    lines.append(Line("preparation of shards / tokenizer alone", wall, processor, 0.8, at_least=True))
    used = prepared["peak_bytes"] / 1e6 if prepared else None
    return [*lines, Line("memory of the preparation, MB", used, None, 500)]


def _steps(options: argparse.Namespace) -> Iterator[Record]:
    with DistContext(options.device) as dist:
        for model, settings in groupby(_settings(options), lambda setting: setting.model):
            for record in _measured(Parts(model, options.dropout, dist), list(settings), options):
                if dist.is_main:
                    yield record


def _settings(options: argparse.Namespace) -> list[Setting]:
    found = []
    for shape, dtype in product(options.shapes or SHAPES[options.device], options.dtypes):
        shape, layouts = _layouts(shape, options)
        found += [Setting.parse(shape, layout, dtype, options.device) for layout in layouts]
    return sorted((s for s in found if _sensible(s)), key=lambda s: s.model)


def _layouts(shape: str, options: argparse.Namespace) -> tuple[str, list[str]]:
    """MODEL:BxS and its layouts, which may be a part of the shape."""
    if shape.count(":") < 2:
        return shape, options.layouts
    shape, _, names = shape.rpartition(":")
    layouts = names.split("+")
    if unknown := set(layouts) - set(LAYOUTS):
        raise ValueError(f"--shapes: expected layouts of {', '.join(LAYOUTS)}, got {', '.join(sorted(unknown))}")
    return shape, layouts


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
    rate = 2e3 * size**3 / min(time_ms(lambda: a @ a, device) for _ in range(10))
    return rate, f"measured matrix product, {rate / 1e12:.3g} TFLOP/s"
