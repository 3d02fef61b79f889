"""The forward of a training step (teacher, student, loss) and the buffer of its gradients.

The training loop, the evaluation and the benchmarks share this code.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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


def teacher_qkv(models: TeacherStudent, batch: Batch, *, bf16: bool = False) -> QKV:
    """The teacher's query, key and value for the loss, as inference tensors; under bfloat16 autocast if `bf16`."""
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


class GradientBuffer:
    """One flat tensor with all gradients, followed by some losses, for a single all-reduce, norm and scaling.

    The `grad` of each parameter becomes a view of the buffer.

    Args:
        parameters: parameters of one device.
        losses: number of elements after the gradients.

    Attributes:
        flat: the buffer, (elements of all parameters + losses,).
        gradients: its first part, (elements of all parameters,).
        losses: its second part, (losses,).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], losses: int = 0) -> None:
        parameters = list(parameters)
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + losses, device=parameters[0].device)
        self.gradients, self.losses = self.flat.split([sum(sizes), losses])
        for parameter, gradient in zip(parameters, self.gradients.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def zero_(self) -> None:
        """Sets gradients and losses to zero."""
        self.flat.zero_()

    def clip_(self, max_norm: float) -> Tensor:
        """Scales the gradients to a norm of at most `max_norm`; 0 turns clipping off. Returns the original norm."""
        norm = torch.linalg.vector_norm(self.gradients)
        if max_norm:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
