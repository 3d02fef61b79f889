"""Suite `data`: what the input pipeline costs, and the speeds of its parts.

`loop` is a step of the training loop with its pipeline, relative to the same step on batches that are ready. The others
are the tokenizer alone, the preparation of token shards, and reading samples from them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import corpus, pipeline, preparation, records
from benchmarks.measure.correctness import guarded
from benchmarks.measure.records import Record
from benchmarks.measure.timing import summary
from benchmarks.measure.training import Setting, model_pair
from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.distributed import DistContext
from minilm_kernels.distill.token_shards import TokenShards
from minilm_kernels.distill.tokenization import DocumentTokenizer

SHAPES = {"cpu": "small:2x512", "cuda": "minilmv2-l6-h384-bert-base:256x512"}
_CHECKED = 1000  # documents whose tokens are compared
_LOOP_BYTES = 1 << 20  # text of the loop
_READ = 2000  # samples


def measure(options: argparse.Namespace) -> Iterator[Record]:
    """The loop, then the parts of the pipeline, which need more time."""
    for shape in options.shapes or [SHAPES[options.device]]:
        for dtype in options.dtypes:
            setting = Setting.parse(shape, "packed", dtype, options.device)
            with tempfile.TemporaryDirectory() as folder:
                yield from _measured(setting, Path(folder), options)


def _measured(setting: Setting, folder: Path, options: argparse.Namespace) -> Iterator[Record]:
    pair = model_pair(setting.model)
    pipeline.folder_of(folder, pair, _LOOP_BYTES)

    def row(name: str, work: Callable[[Record], None]) -> Record:
        workload = setting.workload if name == "loop" else replace(setting.workload, device="cpu")
        record = records.new("data", name, workload, detail={"model": setting.model})
        guarded(record, partial(work, record))
        return record

    yield row("loop", lambda record: _loop(record, setting, folder, options))
    pipeline.folder_of(folder, pair, options.text)
    tokenizer = corpus.tokenizer(pair.student.vocab_size)
    yield row("tokenizer", lambda record: _tokenizer(record, tokenizer, folder / "text.txt", options))
    settings = pipeline.settings_of(folder, pair, "tokens")
    documents = DocumentTokenizer(tokenizer)
    yield row("prepare", lambda record: _prepare(record, settings, documents, folder / "text.txt"))
    yield row("reading", lambda record: _reading(record, documents, folder / "tokens"))


def _loop(record: Record, setting: Setting, folder: Path, options: argparse.Namespace) -> None:
    """Blocks of steps with the pipeline and on prepared data, in turns."""
    settings = pipeline.settings_of(folder, model_pair(setting.model), "run")
    settings |= {"max_seq_length": setting.workload.S, "total_batch_size": setting.workload.B, "dropout": 0.0}
    settings |= {"max_steps": 10**6, "learning_rate": 1e-30, "eval_fraction": 0.0, "device": options.device}
    settings["bf16"] = setting.workload.dtype == "bfloat16"
    steps = pipeline.LoopSteps(DistillConfig(**settings), DistContext(options.device))
    runs, prepared = pipeline.Runs([], []), pipeline.Runs([], [])
    try:
        steps.block(pipeline.Runs([], []), pipeline.Runs([], []))  # a warm-up
        begin, different = time.perf_counter(), 0.0
        while len(runs.wall) < max(2, options.rounds) or time.perf_counter() - begin < options.seconds:
            different = max(different, steps.block(runs, prepared))
    finally:
        steps.close()
    _fill(record, runs.wall, options.device)
    record["error_value"] = record["error_grad"] = different
    record["detail"] |= {
        "prepared_ms": min(prepared.wall),
        "overhead": min(runs.wall) / min(prepared.wall) - 1,
        "median_overhead": statistics.median(a / b for a, b in zip(runs.wall, prepared.wall, strict=True)) - 1,
        "processor_overhead": min(runs.processor) / min(prepared.processor) - 1,
    }


def _tokenizer(record: Record, tokenizer: Any, file: Path, options: argparse.Namespace) -> None:
    preparation.tokenizer_speed(tokenizer, file, 0.5)
    _rate(record, [preparation.tokenizer_speed(tokenizer, file, options.seconds / 3) for _ in range(3)])
    record["error_value"] = record["error_grad"] = 0.0


def _prepare(record: Record, settings: dict[str, Any], tokenizer: DocumentTokenizer, file: Path) -> None:
    speed, record["peak_bytes"] = preparation.preparation(settings)
    _rate(record, [speed])
    wrong = preparation.wrong_tokens(TokenShards(Path(settings["output_dir"])), tokenizer, file, _CHECKED)
    record["error_value"] = record["error_grad"] = wrong
    record["detail"]["text_bytes"] = file.stat().st_size


def _reading(record: Record, tokenizer: DocumentTokenizer, folder: Path) -> None:
    shards = TokenShards(folder)
    _rate(record, [preparation.reading_speed(shards, tokenizer, record["shape"]["S"], _READ) for _ in range(3)])
    record["error_value"] = record["error_grad"] = 0.0


def _rate(record: Record, runs: Sequence[preparation.Speed]) -> None:
    """Writes the fastest of the runs."""
    _fill(record, [1e3 * run.seconds for run in runs], "cpu")
    record["detail"]["tokens_per_s"] = max(run.tokens / run.seconds for run in runs)
    record["detail"]["tokens_per_processor_s"] = max(run.tokens / run.processor for run in runs)


def _fill(record: Record, times: list[float], device: str) -> None:
    """`times` is one run at least."""
    record |= summary(times * 2, device) | {"runs": len(times), "status": "ok", "clocks": records.clocks(device)}
    record["detail"]["best_ms"] = min(times)
