"""Emulates both kernel families: random calls, one call of every kind, and malformed packings.

Every test needs a compiler and takes a second or more. To run more calls: `python -m tests.ptx --cases 50`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from minilm_kernels.relation.masks import Mask
from tests.relation.cases import MALFORMED, all_nan, dense, error, make, malformed

from .__main__ import outcome
from .calls import draw
from .device import Device, Poisoned
from .launch_cuda import cuda_backend
from .launch_triton import triton_backend

pytest.importorskip("triton", reason="Triton is not built for this platform")
# If a real driver library is present, launchers find it instead of its replacement; a GPU then runs the kernels.
_needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels would be launched on the GPU")
pytestmark = [pytest.mark.slow, _needs_no_gpu]

TRITON = ["triton on 8.0", "triton on 9.0"]
CUDA = ["cuda on crowded", "cuda on small"]
MOST = [pytest.param(TRITON[0], marks=pytest.mark.nightly), TRITON[1], *CUDA]


@contextmanager
def _emulated(family: str, device: Device) -> Iterator[str]:
    """Makes the family's backend serve CPU tensors. Yields the backend's name."""
    backend, _, target = family.partition(" on ")
    with triton_backend(device, int(float(target) * 10)) if backend == "triton" else cuda_backend(device, target):
        yield backend


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(x, marks=pytest.mark.nightly) for x in range(8, 20))])
@pytest.mark.parametrize("family", MOST[:3])
def test_random_calls(family, seed):
    device = Device()
    with _emulated(family, device) as backend:
        _, wrong, findings = outcome(device, draw(seed), backend)
    assert wrong == []
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("mask", "relations", "reduction"),
    [("none", "q", "sequence"), ("prefix-holes", "qk", "none"), ("packed-causal", "all", "token")],
)
@pytest.mark.parametrize("family", MOST)
def test_every_kind(family, mask, relations, reduction, dtype):
    fixed = {"dtype": dtype, "mask": mask, "relations": relations, "reduction": reduction, "length": 70, "batch": 2}
    fixed |= {"widths": (16, 8), "heads": 2, "layout": "contiguous", "spread": 1.0, "gradient": True}
    device = Device()
    with _emulated(family, device) as backend:
        _, wrong, findings = outcome(device, draw(1, fixed), backend)
    assert wrong == []
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize(
    ("mask", "heads", "length", "max_seqlen", "spread"),
    [
        pytest.param("none", 12, 200, None, 1.0, id="a program per head"),
        pytest.param("prefix-holes", 12, 97, None, 7.0, id="wide heads"),
        pytest.param("none", 2, 200, None, 1.0, id="programs share heads"),
        pytest.param("packed-causal", 2, 150, None, 7.0, id="programs share wide heads"),
        pytest.param("packed", 12, 300, 1024, 1.0, id="two warps"),
        pytest.param("packed-prefix", 6, 600, 2048, 1.0, id="four warps"),
    ],
)
@pytest.mark.parametrize("family", TRITON)
def test_unordered_pairs(family, mask, heads, length, max_seqlen, spread):
    fixed = {"dtype": "bfloat16", "mask": mask, "relations": "q", "reduction": "token", "length": length, "batch": 1}
    fixed |= {"widths": (16, 8), "heads": heads, "layout": "contiguous", "spread": spread, "gradient": True}
    call = draw(1, fixed)
    if max_seqlen is not None:
        call.kwargs["max_seqlen"] = max_seqlen
    device = Device()
    with _emulated(family, device) as backend:
        _, wrong, findings = outcome(device, call, backend)
    assert wrong == []
    assert [str(finding) for finding in findings] == []
    of_masks = {"sequences_kernel", "weights_kernel"}
    assert {launch[0] for launch in device.launches} - of_masks == {"unordered_kernel", "total_kernel"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("mask", "reduction"), [("none", "sequence"), ("prefix-holes", "none"), ("packed", "token")])
@pytest.mark.parametrize(("relations", "groups"), [("q", (1, 1)), ("qk", (2, 4))])
@pytest.mark.parametrize("family", MOST)
def test_rows_that_count_and_grouped_keys(family, relations, groups, mask, reduction, dtype):
    fixed = {"dtype": dtype, "mask": mask, "relations": relations, "reduction": reduction, "length": 70, "batch": 2}
    fixed |= {"widths": (16, 8), "heads": 4, "layout": "slice", "spread": 1.0, "rows": 0.5, "groups": groups}
    device = Device()
    with _emulated(family, device) as backend:
        _, wrong, findings = outcome(device, draw(1, fixed), backend)
    assert wrong == []
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize("mask", ["none", "prefix-holes", "packed-causal"])
@pytest.mark.parametrize(
    ("gpu", "widths", "length"),
    [
        ("crowded", (16, 8), 200),
        ("crowded", (64, 32), 70),
        ("crowded sm_100", (16, 8), 200),
        ("windows", (16, 8), 300),
        ("windows", (64, 32), 100),
        ("windows sm_100", (16, 8), 300),
    ],
)
def test_strips_of_several_warps(gpu, widths, length, mask):
    """Self relations in bfloat16, in blocks of several warps whose strips meet in several rounds, and in windows."""
    fixed = {"dtype": "bfloat16", "mask": mask, "relations": "q", "reduction": "token", "length": length, "batch": 2}
    fixed |= {"widths": widths, "heads": 1, "layout": "contiguous", "spread": 1.0, "gradient": True, "rows": 0.7}
    device = Device()
    with _emulated(f"cuda on {gpu}", device) as backend:
        _, wrong, findings = outcome(device, draw(1, fixed), backend)
    assert wrong == []
    assert [str(finding) for finding in findings] == []
    segments = [name for name, *_ in device.launches if name.startswith("segments")]
    assert len(segments) == (2 if "windows" in gpu else 0)


@pytest.mark.parametrize("tokens", ["any", "large feature", "large mean"])
@pytest.mark.parametrize("family", TRITON)
def test_float32_products_on_tensor_cores(family, tokens):
    """Truncated sums of bfloat16 products are as accurate as the contract requires of float32."""
    case = make(batch=1, length=150, heads=2, widths=(16, 8))
    change = {"any": lambda x: x, "large feature": large_feature, "large mean": lambda x: 3 + 0.3 * x}[tokens]
    case = replace(case, tensors=tuple(None if x is None else change(x) for x in case.tensors))
    expected, (expected_grad,) = case.oracle("sequence")
    rows, (dense_grad,) = dense(case, torch.full(case.row_shape(), 1 / 300))
    with _emulated(family, Device()) as backend:
        value, (grad,) = case.run("sequence", backend)
    eps = torch.finfo(torch.float32).eps
    assert error(value, expected) <= 2 * error(rows.double().mean(), expected) + eps
    assert error(grad, expected_grad) <= 2 * error(dense_grad, expected_grad) + eps


def large_feature(x: torch.Tensor) -> torch.Tensor:
    """All tokens share one feature ten times as large as the others."""
    return torch.cat([x[..., :-1], 10 + 0.1 * x[..., -1:]], -1)


@pytest.mark.parametrize("relations", ["q", "qk"])
@pytest.mark.parametrize("family", TRITON)
def test_threads_agree_on_a_row(family, relations):
    """float32 rows are loaded one element at a time. All threads still hold the same score of a row with itself."""
    fixed = {"dtype": "float32", "widths": (33, 17), "relations": relations, "layout": "odd slice", "length": 66}
    device = Device()
    with _emulated(family, device) as backend:
        _, wrong, findings = outcome(device, draw(3, fixed | {"spread": 1.0, "mask": "none"}), backend)
    assert wrong == []
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("family", MOST)
def test_malformed_packings_give_nan(family, kind, monkeypatch):
    """On a device the host does not read cu_seqlens. The kernels get sanitized bounds and violate no rule."""
    monkeypatch.setattr(Mask, "check_packing", lambda self: None)
    device = Device()
    with _emulated(family, device) as backend, Poisoned():
        for cross, reduction in ((False, "sequence"), (True, "none")):
            assert all_nan(malformed(kind, cross, heads=2, dtype=torch.bfloat16), reduction, backend)
    assert [str(finding) for finding in device.findings.take()] == []
