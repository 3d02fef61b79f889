"""The evaluation loss: an exact mean over the evaluation samples, without dropout and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import LossWeights
from .config import DistillConfig
from .distributed import DistContext
from .models import TeacherStudent
from .packing import Samples
from .step import loss_vector, make_batch


def evaluate(
    config: DistillConfig,
    models: TeacherStudent,
    samples: Samples,
    dist: DistContext,
    stopped: Callable[[], int],
    within_memory: Callable[[Callable[[int], Tensor]], Tensor],
) -> dict[str, float] | None:
    """Measures the loss over all evaluation samples.

    Args:
        samples: (samples, max_seq_length). Every process evaluates its share of the micro-batches.
        stopped: called before each micro-batch; a result other than 0 stops the evaluation on all processes.
        within_memory: calls a function with the number of samples of a micro-batch, and returns its result.

    Returns:
        `eval_loss`, and the unweighted loss of each relation (`eval_qq`, ...); `None` if it was stopped.
    """
    total = LossWeights.of(samples)
    relations = models.loss.relations

    def share(micro_batch: int) -> Tensor:
        """The losses of this process, (relations,) float64."""
        sums = torch.zeros(len(relations), dtype=torch.float64, device=dist.device)
        starts = range(0, len(samples.ids), micro_batch)
        for first in range(0, len(starts), dist.world_size):
            if stopped():
                break
            # All processes run equally many micro-batches; a repeated one does not count.
            counts = first + dist.rank < len(starts)
            start = starts[first + dist.rank if counts else first]
            part = slice(start, start + micro_batch)
            batch = make_batch(config, models.mask, samples, dist.device, (config.seed, 2), part)
            weight = counts * LossWeights.of(samples.part(part)).weight(config.reduction, total)
            sums += weight * loss_vector(config, models, batch, requires_grad=False).double()
        return sums

    training = models.student.model.training
    models.student.extractor.eval()
    with torch.compiler.set_stance("force_eager"):  # the last micro-batch has a shape of its own
        sums = within_memory(share)
    models.student.extractor.train(training)
    if dist.max(stopped()):
        return None
    measured = dict(zip(relations, dist.sum(sums).tolist(), strict=True))
    loss = sum(weight * measured[name] for name, weight in relations.items())
    return {"eval_loss": loss, **{f"eval_{name}": value for name, value in measured.items()}}
