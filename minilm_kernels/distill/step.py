"""The forward of a training step: teacher, student, loss.

The training loop, the evaluation and the benchmarks share this code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minilm_kernels.losses import QKV

from .batch import Batch, LossWeights, prefix_lengths
from .config import DistillConfig
from .models import TeacherStudent
from .packing import Samples


def make_batch(
    config: DistillConfig, mask: str, samples: Samples, device: torch.device, seed: tuple[int, ...], part: slice
) -> Batch:
    """Creates a batch of a part of the samples.

    Args:
        mask: "bidirectional", "causal" or "prefix".
        samples: all samples of the step, (samples, max_seq_length).
        seed: seed of the prefixes. They are drawn for all samples, so that they do not depend on `part`.
        part: the samples of the batch.
    """
    prefixes = None
    if mask == "prefix":
        before = LossWeights.of(samples.part(slice(0, part.start))).documents
        count = LossWeights.of(samples.part(part)).documents
        prefixes = prefix_lengths(samples, *config.prefix_range, seed)[before : before + count]
    causal = mask == "causal"
    return Batch(samples.part(part), device, packed=config.packing, causal=causal, prefixes=prefixes)


def seed_dropout(seed: int, step: int, first: int) -> None:
    """Seeds torch's generators for the dropout of a micro-batch.

    The numbers depend neither on earlier micro-batches nor on the process. A repeated or resumed step therefore draws
    the same ones, and equal micro-batches have the same dropout for any number of processes.

    Args:
        seed: the seed of the run.
        step: number of finished steps.
        first: index of the micro-batch's first sample in the step.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, 4, step, first)).generate_state(1, np.uint64)[0]))


def teacher_qkv(models: TeacherStudent, batch: Batch, *, bf16: bool = False) -> QKV:
    """The teacher's query, key and value for the loss, as inference tensors; under bfloat16 autocast if `bf16`.

    A teacher whose values the batch has does not run.
    """
    if batch.teacher is not None:
        return batch.teacher
    with torch.inference_mode(), torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        return models.teacher.project(batch)


def student_qkv(models: TeacherStudent, batch: Batch, *, bf16: bool = False) -> QKV:
    """The student's query, key and value for the loss; under bfloat16 autocast if `bf16`."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=bf16):
        return models.student.project(batch)


def loss_components(
    models: TeacherStudent, batch: Batch, *, bf16: bool = False, requires_grad: bool = True
) -> dict[str, Tensor]:
    """The unweighted loss of each relation.

    Args:
        bf16: True to run both models under bfloat16 autocast.
        requires_grad: True to make the losses differentiable in the student's parameters.

    Returns:
        Relation name ("qq", "kk", ...) to a scalar tensor.
    """
    with torch.set_grad_enabled(requires_grad):
        teacher = teacher_qkv(models, batch, bf16=bf16)
        student = student_qkv(models, batch, bf16=bf16)
        return models.loss.components(teacher, student, **batch.loss_arguments())


def loss_vector(config: DistillConfig, models: TeacherStudent, batch: Batch, *, requires_grad: bool) -> Tensor:
    """`loss_components` as one tensor, (relations,), in the order of `models.loss.relations`."""
    values = loss_components(models, batch, bf16=config.bf16, requires_grad=requires_grad)
    return torch.stack([values[name] for name in models.loss.relations])
