"""Memory: no tensor of size B·A·S² is allocated, and only the gradient is saved for the backward."""

import pytest
import torch

from minilm_kernels import QKV, MiniLMv2Loss, relation_kl

from .cases import Case, make

B, S, A = 2, 1024, 2
_SEQUENCES = torch.tensor([0, 700, 1024, 1900, 2048], dtype=torch.int32)
_PREFIX = torch.tensor([300, 900])
_HOLES = torch.rand(B, S, generator=torch.Generator().manual_seed(0)) < 0.9

MODES = {
    "full": {},
    "holes": {"attention_mask": _HOLES},
    "causal": {"causal": True},
    "causal holes": {"causal": True, "attention_mask": _HOLES},
    "prefix": {"prefix_lens": _PREFIX},
    "prefix holes": {"prefix_lens": _PREFIX, "attention_mask": _HOLES},
    "one long sequence": {"cu_seqlens": torch.tensor([0, 2048], dtype=torch.int32)},
    "packed": {"cu_seqlens": _SEQUENCES},
    "packed causal": {"cu_seqlens": _SEQUENCES, "causal": True},
    "packed prefix": {"cu_seqlens": _SEQUENCES, "prefix_lens": torch.tensor([100, 0, 900, 20])},
}


def _largest_allocation(case: Case, reduction: str, backend: str) -> int:
    """Returns the size of the largest single allocation during forward and backward, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        case.run(reduction, backend)
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("reduction", ["sequence", "none"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mode", MODES)
def test_no_allocation_of_quadratic_size(backend, mode, cross, reduction):
    """Allocations stay below one byte for each of the B·A·S² pairs."""
    case = make(MODES[mode], batch=B, length=S, heads=A, widths=(8, 6), cross=cross)
    assert _largest_allocation(case, reduction, backend) < B * A * S * S


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_rows_and_groups_allocate_nothing_of_quadratic_size(backend, reduction):
    case = make(MODES["causal holes"], batch=B, length=S, heads=4, widths=(8, 6), cross=True, rows=0.5, groups=(2, 4))
    assert _largest_allocation(case, reduction, backend) < B * 4 * S * S


def test_the_guard_sees_a_dense_backend():
    case = make(batch=B, length=S, heads=A, widths=(8, 6))
    assert _largest_allocation(case, "sequence", "reference") >= B * A * S * S


def test_saved_for_backward_is_the_gradient(backend):
    saved = []

    def pack(x):
        saved.append(x.numel() * x.element_size())
        return x

    student = QKV(*(torch.randn(2, 64, 24, requires_grad=True) for _ in range(3)))
    teacher = QKV(*(torch.randn(2, 64, 48) for _ in range(3)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        MiniLMv2Loss(12, backend=backend)(teacher, student).backward()
    gradient = sum(x.numel() * 4 for x in student)
    assert gradient <= sum(saved) <= gradient + 64


def test_no_gradient_no_memory(backend):
    case = make(batch=1, length=512, heads=1, widths=(64, 64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        relation_kl(*case.tensors, backend=backend)
    live = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        live += event.nbytes() if event.name() == "[memory]" else 0
    assert live < 4096
