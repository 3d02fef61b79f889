"""Backend `reference`: the definition of the loss, dense and in float64. It is the specification of all backends.

R = softmax(scale X Yᵀ) over the visible keys;  KL_i = Σ_j R_t[i, j] (log R_t[i, j] − log R_s[i, j])

Rows that do not count are rows without visible keys here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minilm_kernels._choices import Reduction
from minilm_kernels.relation.inputs import RelationInputs, grad_buffers


def unavailable_reason() -> str | None:
    return None


def unsupported_reasons(inputs: RelationInputs) -> list[str]:
    return []


def forward_reduced(inputs: RelationInputs, reduction: Reduction, gradient: bool) -> tuple[Tensor, list[Tensor]]:
    weights = inputs.mask.sequence_weights(reduction, inputs.heads, inputs.dtype)
    sequences, _ = inputs.mask.sequences_and_positions()
    per_token = weights.double()[sequences]  # (B, S) or (T,)
    per_row = per_token[..., None, :].expand(_row_shape(inputs))
    values = (_all_rows(inputs, inputs.student) * per_row).flatten(1).sum(1)
    grads = _gradients(inputs, per_row.expand(len(inputs.relations), *per_row.shape)) if gradient else []
    return inputs.total(values.to(inputs.dtype)), grads


def forward_none(inputs: RelationInputs) -> Tensor:
    return _all_rows(inputs, inputs.student).to(inputs.dtype)


def backward_none(inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    return _gradients(inputs, row_grads.double())


def _row_shape(inputs: RelationInputs) -> tuple[int, ...]:
    *batch, positions = inputs.mask.token_shape
    return (*batch, inputs.heads, positions)


def _gradients(inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
    grads = []
    for r, m in grad_buffers(inputs.relations):
        student = [x.detach() for x in inputs.student]
        student[m] = student[m].double().requires_grad_()
        with torch.enable_grad():
            kl = _rows(inputs, inputs.relations[r], student)
        grads.append(torch.autograd.grad(kl, student[m], row_grads[r])[0].to(inputs.dtype).contiguous())
    return grads


def _all_rows(inputs: RelationInputs, student: Sequence[Tensor]) -> Tensor:
    return torch.stack([_rows(inputs, relation, student) for relation in inputs.relations])


def _rows(inputs: RelationInputs, relation: tuple[int, int], student: Sequence[Tensor]) -> Tensor:
    """Returns the KL of every row of a relation, (B, A, S) or (A, T)."""
    scale_t, scale_s = inputs.scales(relation)
    visible = inputs.mask.dense()[:, None]  # (B, 1, S, S)
    log_t = _log_relation(inputs, inputs.teacher, relation, scale_t, visible)
    log_s = _log_relation(inputs, student, relation, scale_s, visible)
    # Both log-probabilities of an invisible key are −inf. Their difference, NaN, is masked before the multiplication.
    kl = (log_t.exp() * (log_t - log_s).masked_fill(~visible, 0.0)).sum(-1)
    return kl.reshape(_row_shape(inputs))


def _log_relation(
    inputs: RelationInputs, tensors: Sequence[Tensor], relation: tuple[int, int], scale: float, visible: Tensor
) -> Tensor:
    """Returns log R of one model, (B, A, S, S) in float64. Packed tokens are treated as a batch of one sequence."""
    query, key = (
        torch.where(used[..., None, None], tensors[m].double(), 0.0)
        for m, used in zip(relation, (inputs.mask.counted, inputs.mask.valid), strict=True)
    )
    key = key.repeat_interleave(inputs.heads // key.shape[-2], dim=-2)
    if inputs.mask.packed:
        query, key = query[None], key[None]
    scores = scale * torch.einsum("biad,bjad->baij", query, key)
    # A row without visible keys gets the same uniform relation in both models, so that its KL is 0.
    has_keys = visible.any(-1, keepdim=True)
    return scores.masked_fill(~visible & has_keys, -torch.inf).masked_fill(~has_keys, 0.0).log_softmax(-1)
