"""Who is measured: each provider turns tensors into the loss (mean over heads and real rows) and student gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minilm_kernels import available_backends
from minilm_kernels.relation import relations_kl

Step = Callable[[], tuple[Tensor, list[Tensor]]]


class Unsupported(Exception):
    """The provider cannot compute this workload; the message says why."""


def _by_autograd(loss: Callable[[list[Tensor]], Tensor], student: list[Tensor]) -> Step:
    def step():
        leaves = [x.detach().requires_grad_() for x in student]
        value = loss(leaves)
        return value.detach(), list(torch.autograd.grad(value, leaves))

    return step


def ours(backend: str, teacher: list[Tensor], student: list[Tensor], mask: dict) -> Step:
    """This package: all relations in one operator call."""
    reason = available_backends()[backend]
    if reason is not None:
        raise Unsupported(reason)
    names = [str(n) for n in range(len(teacher))]

    def loss(leaves: list[Tensor]) -> Tensor:
        sides = [dict(zip(names, side, strict=True)) for side in (teacher, leaves)]
        pairs = [(n, n) for n in names]
        return relations_kl(sides[0], sides[1], pairs, reduction="token", backend=backend, **mask).sum()

    return _by_autograd(loss, student)


def _dense_loss(teacher: list[Tensor], student: list[Tensor], hidden: Tensor | None, rows: Tensor | None) -> Tensor:
    total = student[0].new_zeros(())
    for x_t, x_s in zip(teacher, student, strict=True):
        log_t, log_s = (_dense_log_relation(x, hidden) for x in (x_t, x_s))
        difference = log_t - log_s
        if hidden is not None:
            difference = difference.masked_fill(hidden, 0.0)
        kl = (log_t.exp() * difference).sum(-1)
        total = total + (kl.mean() if rows is None else (kl * rows).sum() / (rows.sum() * kl.shape[1]))
    return total


def _dense_log_relation(x: Tensor, hidden: Tensor | None) -> Tensor:
    heads = x.transpose(1, 2)
    scores = heads @ heads.mT * x.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.log_softmax(-1)


def _dense_mask(student: list[Tensor], mask: dict) -> tuple[Tensor | None, Tensor | None]:
    """Keys to hide, and rows that count. Padded rows see the keys that real rows see, so that no row is empty."""
    length = student[0].shape[1]
    if mask.get("causal"):
        ones = torch.ones(length, length, dtype=torch.bool, device=student[0].device)
        return ones.triu(1), None
    if "attention_mask" in mask:
        real = mask["attention_mask"].bool()
        return ~real[:, None, None, :], real[:, None, :].to(student[0].dtype)
    return None, None


def eager(teacher: list[Tensor], student: list[Tensor], mask: dict) -> Step:
    """Dense PyTorch, as public MiniLMv2 code computes it, with its mistakes repaired."""
    hidden, rows = _dense_mask(student, mask)
    return _by_autograd(lambda leaves: _dense_loss(teacher, leaves, hidden, rows), student)


def compiled(teacher: list[Tensor], student: list[Tensor], mask: dict) -> Step:
    """torch.compile of the dense loss."""
    hidden, rows = _dense_mask(student, mask)
    torch._dynamo.reset()
    loss = torch.compile(_dense_loss, dynamic=False)
    return _by_autograd(lambda leaves: loss(teacher, leaves, hidden, rows), student)


def composed(teacher: list[Tensor], student: list[Tensor], mask: dict) -> Step:
    """Composed from attention kernels: no score matrix in memory, six visits of every pair.

    KL_i = scale_t q_t·O_tt − scale_s q_s·O_ts − lse_t + lse_s with O_ts = attn(Q_t, K_t, V = K_s); dQ_s = scale_s g
    (O_ss − O_ts), and dK_s from the value gradients of two attention backwards with dO = g Q_s.
    """
    if student[0].device.type != "cpu":
        raise Unsupported("written for the CPU's attention kernel")
    if "attention_mask" in mask:
        raise Unsupported("the attention kernel takes no padding mask without a dense bias")
    causal = mask.get("causal", False)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def one(x_t: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
        width_t, width_s = x_t.shape[-1], x_s.shape[-1]
        q_t, q_s = (x.transpose(1, 2).contiguous() for x in (x_t, x_s))
        scale_t, scale_s = width_t**-0.5, width_s**-0.5
        wide = torch.nn.functional.pad(q_s, (0, width_t - width_s))  # the kernel wants one width
        o_tt, lse_t = forward(q_t, q_t, q_t, is_causal=causal, scale=scale_t)
        o_ts, lse_ts = forward(q_t, q_t, wide, is_causal=causal, scale=scale_t)
        o_ss, lse_s = forward(q_s, q_s, q_s, is_causal=causal, scale=scale_s)
        kl = scale_t * (q_t * o_tt).sum(-1) - scale_s * (q_s * o_ts[..., :width_s]).sum(-1) - lse_t + lse_s
        g = 1 / kl.numel()
        query_grad = o_ss - o_ts[..., :width_s]
        value_s = backward(g * q_s, q_s, q_s, q_s, o_ss, lse_s, 0.0, causal, scale=scale_s)[2]
        value_t = backward(g * wide, q_t, q_t, wide, o_ts, lse_ts, 0.0, causal, scale=scale_t)[2][..., :width_s]
        return kl.mean(), scale_s * (g * query_grad + value_s - value_t).transpose(1, 2)

    def step():
        values, grads = zip(*(one(*pair) for pair in zip(teacher, student, strict=True)), strict=True)
        return torch.stack(values).sum(), list(grads)

    return step


PROVIDERS: dict[str, Callable[[list[Tensor], list[Tensor], dict], Step]] = {
    "eager": eager,
    "torch.compile": compiled,
    "sdpa": composed,
    **{name: partial(ours, name) for name in available_backends() if name != "reference"},
}
