"""AdamW and the learning-rate schedule of a run."""

from __future__ import annotations

import torch
from torch import nn

from .config import DistillConfig


def make_optimizer(config: DistillConfig, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Creates a fused AdamW. One-dimensional parameters (biases and LayerNorms) get no weight decay."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_epsilon, fused=True
    )


def learning_rate_at(config: DistillConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear warmup to the peak, then linear decay to 0 after the last step.

    Example:
        >>> from minilm_kernels.distill import DistillConfig
        >>> config = DistillConfig(
        ...     teacher="t", student="s", text="corpus", output_dir="run",
        ...     max_steps=10, warmup_steps=2, learning_rate=1.0,
        ... )
        >>> [learning_rate_at(config, step) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    return config.learning_rate * (config.max_steps - step) / (config.max_steps - config.warmup)
