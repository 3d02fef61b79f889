"""Other packages, where they are installed. Each is called as its users call it; nothing of it is copied."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Inputs

from .support import DenseMask, Loss, Unsupported


def _import(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a package for other versions of its requirements fails in any way
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise Unsupported(f"{package} is not usable here: {line[0]}") from error


def bertdistiller(inputs: Inputs) -> Loss:
    """Scores as its trainer makes them, and the trainer's own divergence: a loop over sequences, right padding only."""
    trainer = _import("bertdistiller", "bertdistiller.distillation.minilm.trainer").MiniLMTrainer
    if set(inputs.mask) - {"attention_mask"}:
        raise Unsupported("bertdistiller knows padding on the right and no other mask")
    x = next(iter(inputs.student.values()))
    real = inputs.mask.get("attention_mask", torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
    if (real.long().diff(dim=1) > 0).any():
        raise Unsupported("bertdistiller takes every mask for padding on the right")
    state = SimpleNamespace(
        args=SimpleNamespace(num_relation_heads=inputs.heads), kl_loss=torch.nn.KLDivLoss(reduction="sum")
    )

    def scores(side: dict[str, Tensor], query: str, key: str) -> Tensor:
        q, k = (side[name].permute(0, 2, 1, 3) for name in (query, key))
        return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])

    def loss(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> Tensor:
        parts = [
            trainer._compute_kl_divergence(state, scores(teacher, *names).detach(), scores(student, *names), real)
            for names in inputs.relations
        ]
        return torch.stack(parts).sum()

    return loss


def liger(inputs: Inputs) -> Loss:
    """It has no relation loss: its KL divergence takes log-probabilities, which dense PyTorch makes."""
    x = next(iter(inputs.student.values()))
    if not x.is_cuda:
        raise Unsupported("liger-kernel's kernels are Triton kernels for GPUs")
    if inputs.mask:
        raise Unsupported("liger-kernel's KL divergence takes no mask")
    divergence = _import("liger-kernel", "liger_kernel.transformers").LigerKLDIVLoss(
        reduction="batchmean", log_target=True
    )
    mask = DenseMask.of(inputs)

    def rows(side: dict[str, Tensor], query: str, key: str) -> Tensor:
        q, k = mask.padded(side[query]), mask.padded(side[key])
        return (q @ k.mT * q.shape[-1] ** -0.5).log_softmax(-1).flatten(0, 2)

    def loss(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> Tensor:
        parts = [divergence(rows(student, *names), rows(teacher, *names)) for names in inputs.relations]
        return torch.stack(parts).sum()

    return loss
