"""Losses of other packages, if these are installed. Each is called as its users call it; no code is copied."""

from __future__ import annotations

import math
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.workload import Inputs, Loss

from .dense import relation_sum
from .provider import DenseMask, Unsupported


def _import(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a package for other versions of its requirements may raise any exception
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise Unsupported(f"{package} is not usable here: {line[0]}") from error


def bertdistiller(inputs: Inputs) -> Loss:
    """The divergence of bertdistiller's trainer, which loops over sequences and supports right padding only."""
    trainer = _import("bertdistiller", "bertdistiller.distillation.minilm.trainer").MiniLMTrainer
    if set(inputs.mask) - {"attention_mask"}:
        raise Unsupported("bertdistiller supports no mask but padding on the right")
    x = inputs.example
    valid = inputs.mask.get("attention_mask", torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
    if (valid.long().diff(dim=1) > 0).any():
        raise Unsupported("bertdistiller treats every mask as padding on the right")
    state = SimpleNamespace(
        args=SimpleNamespace(num_relation_heads=inputs.heads), kl_loss=torch.nn.KLDivLoss(reduction="sum")
    )

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT / math.sqrt(query.shape[-1])

    def relation(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
        return trainer._compute_kl_divergence(state, scores(q_t, k_t).detach(), scores(q_s, k_s), valid)

    return relation_sum(inputs, DenseMask.of(inputs), relation)


def liger(inputs: Inputs) -> Loss:
    """Liger's KL divergence, applied to log-probabilities of dense PyTorch. Liger has no relation loss."""
    if not inputs.example.is_cuda:
        raise Unsupported("liger-kernel's kernels are Triton kernels for GPUs")
    if inputs.mask:
        raise Unsupported("liger-kernel's KL divergence takes no mask")
    module = _import("liger-kernel", "liger_kernel.transformers")
    divergence = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def log_rows(query: Tensor, key: Tensor) -> Tensor:
        return (query @ key.mT * query.shape[-1] ** -0.5).log_softmax(-1).flatten(0, 2)

    def relation(q_t: Tensor, k_t: Tensor, q_s: Tensor, k_s: Tensor) -> Tensor:
        return divergence(log_rows(q_s, k_s), log_rows(q_t, k_t))

    return relation_sum(inputs, DenseMask.of(inputs), relation)
