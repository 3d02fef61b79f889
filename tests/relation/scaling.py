"""The backward of a reduced loss by a kernel, for the tests of both backends that have one."""

from __future__ import annotations

import torch

from minilm_kernels.relation.inputs import Backend, Scaling

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_scaling(
    backend: Backend, shape: tuple[int, ...], upstream: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    """Compares bits with PyTorch's operators: three tensors of these dtypes, with one, two and three parts."""
    owners = [0, 1, 1, 2, 2, 2]
    parts = [torch.randn(shape) * 10.0 ** torch.randint(-9, 5, shape) for _ in owners]
    relations, weights = [1, 0, 2, 2, 1, 0], [1.0, 0.5, 3.0, 1e-3, 2.0, -1.0]
    scaling = Scaling(upstream, parts, relations, weights, owners, list(dtypes))
    results = backend.scale(scaling)
    for owner, (dtype, got) in enumerate(zip(dtypes, results, strict=True)):
        total = None
        for part, relation, weight, m in zip(parts, relations, weights, owners, strict=True):
            if m == owner:
                x = part * ((upstream[relation] if upstream.dim() else upstream) * weight)
                total = x if total is None else total + x
        assert got.dtype == dtype
        assert torch.equal(got, total.to(dtype))
    assert backend.scale(scaling._replace(parts=[x.double() for x in parts])) is None
    assert backend.scale(scaling._replace(dtypes=[torch.float64] * 3)) is None
