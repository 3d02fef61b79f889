"""Inputs for the operator's tests: every mask mode, and the dense PyTorch loss to which errors are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minilm_kernels.relation import relation_kl

LENGTHS = (19, 7, 23, 1, 0, 12)  # lengths of the packed sequences, and valid tokens of the padded ones
B, S = len(LENGTHS), max(LENGTHS)


def _padding(kind: str) -> Tensor:
    if kind == "holes":
        mask = torch.rand(B, S, generator=torch.Generator().manual_seed(5)) < 0.6
        mask[4] = False
        return mask
    right = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
    return right.flip(1) if kind == "left" else right


_PREFIX = torch.tensor([4, 0, 23, 1, 3, 40])
_CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()

MASKS: dict[str, dict] = {
    "none": {},
    "right": {"attention_mask": _padding("right")},
    "left": {"attention_mask": -_padding("left").long()},  # any value but 0 marks a valid token
    "holes": {"attention_mask": _padding("holes").to(torch.uint8) * 7},
    "causal": {"causal": True},
    "causal-holes": {"causal": True, "attention_mask": _padding("holes")},
    "prefix": {"prefix_lens": _PREFIX},
    "prefix-left": {"prefix_lens": _PREFIX, "attention_mask": _padding("left")},
    "prefix-holes": {"prefix_lens": _PREFIX.int(), "attention_mask": _padding("holes")},
    "packed": {"cu_seqlens": _CU_SEQLENS},
    "packed-causal": {"cu_seqlens": _CU_SEQLENS, "max_seqlen": 23, "causal": True},
    "packed-prefix": {"cu_seqlens": _CU_SEQLENS, "max_seqlen": 64, "prefix_lens": _PREFIX},
}


# Malformed packings of 40 tokens: cu_seqlens and max_seqlen.
MALFORMED: dict[str, tuple[list[int], int | None]] = {
    "starts late": ([3, 20, 40], None),
    "starts below 0": ([-3, 20, 40], None),
    "ends early": ([0, 20, 37], None),
    "ends beyond T": ([0, 20, 43], None),
    "overlapping": ([0, 30, 20, 40], None),
    "decreasing": ([40, 20, 0], None),
    "negative": ([0, -5, 40], None),
    "beyond T in the middle": ([0, 99, 40], None),
    "extreme": ([2**31 - 1, -(2**31), 0, 1], None),
    "differences overflow": ([0, 2**31 - 1, -(2**31), 40], None),
    "empty sequences only": ([0, 0, 0], None),
    "beyond max_seqlen": ([0, 10, 40], 29),
    "one sequence beyond max_seqlen": ([0, 40], 12),
}


@dataclass(frozen=True)
class Case:
    """Arguments of one `relation_kl` call; the student's tensors are leaves."""

    tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    kwargs: dict

    def run(self, reduction: str, backend: str, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns value and gradients. `upstream` weights the rows of reduction "none", or scales a reduced loss."""
        leaves = {id(x): x.detach().requires_grad_() for x in self.tensors[2:] if x is not None}
        student = [None if x is None else leaves[id(x)] for x in self.tensors[2:]]
        value = relation_kl(*self.tensors[:2], *student, reduction=reduction, backend=backend, **self.kwargs)
        value.backward(torch.ones_like(value) if upstream is None else upstream.to(value))
        return value.detach(), [x.grad for x in leaves.values()]

    def to(self, *args) -> Case:
        moved = {id(x): x.to(*args) for x in self.tensors if x is not None}
        return replace(self, tensors=tuple(None if x is None else moved[id(x)] for x in self.tensors))

    def on(self, device: str) -> Case:
        kwargs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.kwargs.items()}
        return replace(self.to(device), kwargs=kwargs)

    def oracle(self, reduction: str, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        return self.to(torch.float64).run(reduction, "reference", upstream)

    def token_shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[0].shape[:-2])

    def row_shape(self) -> tuple[int, ...]:
        *batch, positions, heads, _ = self.tensors[0].shape
        return (*batch, heads, positions)


def make(
    mask: str | dict = "none",
    *,
    cross: bool = False,
    widths: tuple[int, int] = (12, 6),
    heads: int = 3,
    batch: int = B,
    length: int = S,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 1.0,
    rows: float | None = None,
    groups: tuple[int, int] = (1, 1),
) -> Case:
    """Returns a seeded random case.

    `mask` is a name in MASKS (for the default batch and length only), or kwargs. `rows` is the share of rows that
    count. `groups`: query heads per key head of teacher and student, in cross relations.
    """
    kwargs = MASKS[mask] if isinstance(mask, str) else mask
    generator = torch.Generator().manual_seed(seed)
    token_shape = (int(kwargs["cu_seqlens"][-1]),) if "cu_seqlens" in kwargs else (batch, length)
    if rows is not None:
        kwargs = kwargs | {"query_mask": _query_mask(token_shape, kwargs.get("cu_seqlens"), rows)}

    def draw(width: int, group: int = 1) -> Tensor:
        return (spread * torch.randn(*token_shape, heads // group, width, generator=generator)).to(dtype)

    width_t, width_s = widths
    teacher = (draw(width_t), draw(width_t, groups[0]) if cross else None)
    student = (draw(width_s), draw(width_s, groups[1]) if cross else None)
    return Case((*teacher, *student), kwargs)


def _query_mask(token_shape: tuple[int, ...], cu_seqlens: Tensor | None, share: float) -> Tensor:
    """Returns random rows that count; in a batch of more than 2 sequences, none of the third and all of the first."""
    mask = torch.rand(token_shape, generator=torch.Generator().manual_seed(7)) < share
    sequences = list(mask) if cu_seqlens is None else mask.split(cu_seqlens.diff().tolist())
    if len(sequences) > 2:
        sequences[0].fill_(True)
        sequences[2].fill_(False)
    return mask


def malformed(kind: str, cross: bool = False, **more) -> Case:
    """Returns a call with a packing of MALFORMED, which raises an error on a CPU."""
    bounds, max_seqlen = MALFORMED[kind]
    case = make({"cu_seqlens": torch.tensor([0, 40])}, cross=cross, widths=(16, 8), **more)
    return replace(case, kwargs={"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "max_seqlen": max_seqlen})


def all_nan(case: Case, reduction: str, backend: str) -> bool:
    """Returns whether every value of a call and every entry of its gradients is NaN."""
    value, grads = case.run(reduction, backend)
    return bool(value.isnan().all() and all(grad.isnan().all() for grad in grads))


def dense(case: Case, upstream: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Returns rows and gradients of the plain dense loss in the dtype of the inputs, as written in eager PyTorch.

    Scores, softmax and KL stay in that dtype. Only full, dense batches without masks are supported.
    """
    q_t, k_t, q_s, k_s = case.tensors
    leaves = [x.detach().requires_grad_() for x in (q_s, k_s) if x is not None]
    k_t = q_t if k_t is None else k_t

    def log_relation(query: Tensor, key: Tensor, model: str) -> Tensor:
        scale = case.kwargs.get(f"{model}_scale", query.shape[-1] ** -0.5)
        return (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * scale).log_softmax(-1)

    log_t, log_s = log_relation(q_t, k_t, "teacher"), log_relation(leaves[0], leaves[-1], "student")
    rows = (log_t.exp() * (log_t - log_s)).sum(-1)
    rows.backward(torch.ones_like(rows) if upstream is None else upstream.to(rows))
    return rows.detach(), [x.grad for x in leaves]


def error(got: Tensor, expected: Tensor) -> float:
    """Returns the relative error in the Euclidean norm, or the absolute error if the expected value is 0."""
    difference, norm = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / norm if norm else difference


def check_beside_dense(case: Case, reduction: str, backend: str) -> None:
    """Checks that errors are at most twice those of dense PyTorch, plus one rounding.

    The reduction is "sum", or "none" with random weights of rows.
    """
    weights = torch.randn(case.row_shape(), generator=torch.Generator().manual_seed(3)) if reduction == "none" else None
    value, grads = case.run(reduction, backend, weights)
    expected, expected_grads = case.oracle(reduction, weights)
    rows, dense_grads = dense(case, weights)
    eps = torch.finfo(torch.float32).eps
    assert error(value, expected) <= 2 * error(rows, case.oracle("none")[0]) + eps
    for grad, dense_grad, expected_grad in zip(grads, dense_grads, expected_grads, strict=True):
        assert error(grad, expected_grad) <= 2 * error(dense_grad, expected_grad) + eps
