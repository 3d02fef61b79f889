"""The held-out relation KL: an exact average over the held-out rows, without dropout and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Batch, Counts, prefix_lengths
from .config import DistillConfig
from .data import Rows
from .distributed import Processes
from .models import Pair


def make_batch(config: DistillConfig, rows: Rows, device: torch.device, seed: tuple[int, ...], part: slice) -> Batch:
    """The `part` of `rows` as a batch; prefixes are drawn for all rows, so that they do not depend on the part."""
    prefixes = None
    if config.mask == "prefix":
        before = Counts.of(rows.part(slice(0, part.start))).documents
        count = Counts.of(rows.part(part)).documents
        prefixes = prefix_lengths(rows, *config.prefix_range, seed)[before : before + count]
    causal = config.mask == "causal"
    return Batch(rows.part(part), device, packed=config.packing, causal=causal, prefixes=prefixes)


def heldout_loss(
    config: DistillConfig, pair: Pair, rows: Rows, micro: int, processes: Processes, stopped: Callable[[], int]
) -> dict[str, float] | None:
    """The loss, and each relation by itself and unweighted, over all held-out rows; `None` if it was stopped.

    Args:
        rows: (rows, seq_len); every process measures its share of the micro-batches of `micro` rows.
        stopped: asked before each micro-batch; where one process stops, all do.
    """
    total = Counts.of(rows)
    names = list(pair.loss.relations)
    sums = torch.zeros(len(names), dtype=torch.float64, device=processes.device)
    training = pair.student.model.training
    pair.student.model.eval()
    starts = range(0, len(rows.ids), micro)
    for start in starts[processes.rank :: processes.count]:
        if stopped():
            break
        part = slice(start, start + micro)
        batch = make_batch(config, rows, processes.device, (config.seed, 2), part)
        values = components(config, pair, batch, gradient=False)
        weight = Counts.of(rows.part(part)).weight(config.reduction, total)
        sums += weight * torch.stack([values[name] for name in names]).double()
    pair.student.model.train(training)
    if processes.largest(stopped()):
        return None
    measured = dict(zip(names, processes.sum(sums).tolist(), strict=True))
    return {"loss": sum(weight * measured[name] for name, weight in pair.loss.relations.items()), **measured}


def components(config: DistillConfig, pair: Pair, batch: Batch, *, gradient: bool) -> dict[str, Tensor]:
    """Every relation's loss of a batch, unweighted; differentiable in the student if `gradient`."""
    with torch.set_grad_enabled(gradient):
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            teacher = pair.teacher.project(batch)
            student = pair.student.project(batch)
        return pair.loss.components(teacher, student, **batch.loss_arguments())
