"""Backend `reference`: the definition word for word, dense and in float64. It is the specification.

R = softmax(scale X Yᵀ) over the visible keys;  KL_i = Σ_j R_t[i, j] (log R_t[i, j] − log R_s[i, j])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import RelationInputs, grad_buffers


def unavailable_reason() -> str | None:
    return None


def unsupported_reasons(problem: RelationInputs) -> list[str]:
    return []


def forward_reduced(problem: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    sequence, _ = problem.mask.sequence_and_position()
    per_token = weights.double()[sequence]  # (B, S) or (T,)
    per_row = per_token[..., None, :].expand(_row_shape(problem))
    values = (_all_rows(problem, problem.student) * per_row).flatten(1).sum(1)
    grads = _gradient(problem, per_row.expand(len(problem.relations), *per_row.shape)) if gradient else []
    return values.to(problem.dtype), grads


def forward_none(problem: RelationInputs) -> Tensor:
    return _all_rows(problem, problem.student).to(problem.dtype)


def backward_none(problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    return _gradient(problem, row_grads.double())


def _row_shape(problem: RelationInputs) -> tuple[int, ...]:
    *batch, positions = problem.mask.token_shape
    return (*batch, problem.heads, positions)


def _gradient(problem: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    grads = []
    for r, m in grad_buffers(problem.relations):
        student = [x.detach() for x in problem.student]
        student[m] = student[m].double().requires_grad_()
        with torch.enable_grad():
            kl = _rows(problem, problem.relations[r], student)
        grads.append(torch.autograd.grad(kl, student[m], row_grads[r])[0].to(problem.dtype).contiguous())
    return grads


def _all_rows(problem: RelationInputs, student: Sequence[Tensor]) -> Tensor:
    return torch.stack([_rows(problem, relation, student) for relation in problem.relations])


def _rows(problem: RelationInputs, relation: tuple[int, int], student: Sequence[Tensor]) -> Tensor:
    scale_t, scale_s = problem.scales(relation)
    visible = problem.mask.dense()[:, None]  # (B, 1, S, S)
    log_t = _log_relation(problem, problem.teacher, relation, scale_t, visible)
    log_s = _log_relation(problem, student, relation, scale_s, visible)
    # Hidden keys have log-probability −inf on both sides: their difference is taken out before it can become NaN.
    kl = (log_t.exp() * (log_t - log_s).masked_fill(~visible, 0.0)).sum(-1)
    return kl.reshape(_row_shape(problem))


def _log_relation(problem: RelationInputs, side, relation: tuple[int, int], scale: float, visible: Tensor) -> Tensor:
    """(B, A, S, S) float64 log-probabilities; packed tokens are one row of a batch of 1."""
    real = problem.mask.valid[..., None, None]
    query, key = (torch.where(real, side[m].double(), 0.0) for m in relation)
    if problem.mask.packed:
        query, key = query[None], key[None]
    scores = scale * torch.einsum("biad,bjad->baij", query, key)
    # A row without any visible key gets a harmless uniform relation; both sides alike, so its KL is 0.
    hidden = ~visible & visible.any(-1, keepdim=True)
    return scores.masked_fill(hidden, -torch.inf).masked_fill(~visible.any(-1, keepdim=True), 0.0).log_softmax(-1)
