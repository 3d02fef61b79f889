"""Every provider computes the same loss and gradient under every mask."""

import pytest
import torch

from benchmarks.measure import correctness
from benchmarks.measure.correctness import Oracle, loss_and_gradients
from benchmarks.measure.timed_loss import TimedLoss
from benchmarks.measure.workload import MASKS, Workload
from benchmarks.providers import PROVIDERS, Unsupported
from benchmarks.providers.dense import relation_sum
from benchmarks.providers.provider import DenseMask
from minilm_kernels.relation import relation_kl_multi
from minilm_kernels.relation.masks import Mask

# Providers that run on any CPU. torch.compile takes seconds per shape and has a test of its own.
RUNNABLE = ["eager", "chunked", "sdpa", "cpu", "torch"]
# Allowed error of float32 relative to float64. Means over so few rows have errors of about 1e-6.
TOLERANCE = 2e-5


def reference(inputs):
    """Loss and gradients of the dense float64 specification."""
    exact = inputs.map(torch.Tensor.double)
    leaves = {name: x.requires_grad_() for name, x in exact.student.items()}
    value = relation_kl_multi(exact.teacher, leaves, exact.relations, backend="reference", **exact.mask).sum()
    return value.detach(), torch.autograd.grad(value, list(leaves.values()))


def errors(name, inputs, mode="full"):
    value, grads = TimedLoss(PROVIDERS[name].build(inputs), [inputs], mode)()
    expected, expected_grads = reference(inputs)
    worst = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(grads, expected_grads, strict=bool(grads))]
    return [abs(value.double() - expected).item() / expected.item(), *worst]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", RUNNABLE)
def test_loss_and_gradient(name, mask):
    inputs = Workload(3, 3, 70, 12, 6, "qq,vk", mask).inputs()
    try:
        assert max(errors(name, inputs)) < TOLERANCE
    except Unsupported:
        assert name == "cpu"  # the package was installed without the library


@pytest.mark.slow
def test_torch_compile():
    assert max(errors("torch.compile", Workload(2, 2, 33, 8, 4, "qk", "lengths+causal").inputs())) < TOLERANCE


def test_half_precision_scores_in_float32():
    inputs = Workload(2, 3, 70, 16, 8, "qq", "lengths", "bfloat16").inputs()
    wide, narrow = (max(errors(name, inputs)) for name in ("eager-fp32-softmax", "eager"))
    assert wide < narrow < 0.2
    with pytest.raises(Unsupported, match="half precision"):
        PROVIDERS["eager-fp32-softmax"].build(Workload(1, 1, 8, 4, 4).inputs())


@pytest.mark.parametrize("name", [n for n in PROVIDERS if n not in (*RUNNABLE, "torch.compile", "eager-fp32-softmax")])
def test_others_say_why_not_or_are_right(name):
    inputs = Workload(1, 2, 16, 8, 4).inputs()
    try:
        worst = max(errors(name, inputs))
    except Unsupported as error:
        reason = str(error)
        worst = 0.0 if len(reason) > 10 else 1.0
    assert worst < TOLERANCE


def test_liger_and_flex_are_refused_on_a_cpu():
    for name, message in (("liger-kernel", "GPUs"), ("flex", "CPUs")):
        with pytest.raises(Unsupported, match=message):
            PROVIDERS[name].build(Workload(1, 1, 8, 4, 4).inputs())


def test_heads_are_widened_once():
    """A second copy of the query as the key of a self relation would be unfair to a provider's memory."""
    inputs = Workload(1, 2, 8, 8, 4, "qq,qk").inputs()
    found = []

    def relation(*heads):
        found.append(heads)
        return torch.zeros(())

    relation_sum(inputs, DenseMask.of(inputs), relation, width=8)(inputs.teacher, inputs.student)
    (q_t, same_t, q_s, same_s), (again_t, k_t, again_s, k_s) = found
    assert q_t is same_t is again_t
    assert q_s is same_s is again_s
    assert q_t.data_ptr() == inputs.teacher["q"].data_ptr()  # wide enough
    torch.testing.assert_close(q_s, torch.nn.functional.pad(inputs.student["q"].transpose(1, 2), (0, 4)))
    assert [x.shape for x in (k_t, k_s)] == [(1, 2, 8, 8)] * 2


def test_modes():
    inputs = Workload(2, 2, 40, 8, 4, "qq,kk").inputs()
    loss = PROVIDERS["torch"].build(inputs)
    value, grads = TimedLoss(loss, [inputs], "full")()
    forward, none = TimedLoss(loss, [inputs], "forward")()
    backward_value, backward = TimedLoss(loss, [inputs], "backward")()
    assert none == []
    torch.testing.assert_close(forward, value)
    torch.testing.assert_close(backward_value, value)
    torch.testing.assert_close(backward, grads)


@pytest.mark.parametrize("mask", MASKS)
def test_the_oracle_is_the_reference_whatever_its_blocks(mask):
    inputs = Workload(3, 2, 40, 6, 4, "qq,vk", mask).inputs()
    expected, expected_grads = reference(inputs)
    for scores in (1, 2 * 40 * 7, 10**9):
        value, grads = loss_and_gradients(inputs, scores)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


def test_the_oracle_checks_a_part_of_a_whole(monkeypatch):
    """The gradients are those of all sequences, the value is that of the checked part."""
    for mask in ("none", "lengths", "packed", "prefix"):
        workload = Workload(6, 2, 40, 8, 4, "qq,kk", mask)
        monkeypatch.setitem(correctness._MAX_PAIRS, "cpu", workload.pairs // 2)
        inputs = workload.inputs()
        part = Oracle(inputs, workload.pairs, "cpu")
        assert part.sequences == 3
        loss = PROVIDERS["torch"].build(inputs)
        _, grads = TimedLoss(loss, [inputs], "full")()
        value, _ = TimedLoss(PROVIDERS["torch"].build(part.part), [part.part], "full")()
        assert max(part.errors(value, grads)) < TOLERANCE
        assert max(part.errors(value, [1.01 * g for g in grads])) == pytest.approx(0.01, rel=0.1)


def test_pairs_count_what_the_mask_shows():
    for mask in MASKS:
        workload = Workload(4, 2, 30, 4, 4, "qq,kk", mask)
        inputs = workload.inputs()
        leading = tuple(inputs.student["q"].shape[:-2])
        seen = Mask(leading, torch.device("cpu"), **inputs.mask).dense().sum()
        assert workload.visible_pairs == 2 * 2 * int(seen)
        assert workload.pairs >= workload.visible_pairs


@pytest.mark.parametrize("text", ["2x48x512x16", "v3:2x2", "0x1x1x1x1", "v1:0x5", "axbxcxdxe"])
def test_bad_shapes_are_named(text):
    with pytest.raises(ValueError, match="--shapes"):
        Workload.parse(text)


def test_families_say_their_relations():
    assert Workload.parse("v2-base:32x512") == Workload(32, 48, 512, 16, 8, "qq,kk,vv")
    assert Workload.parse("v1:4x128", "qk") == Workload(4, 12, 128, 64, 32, "qk")
    with pytest.raises(ValueError, match="--relations"):
        Workload.parse("v1:4x128", "qz")
    with pytest.raises(ValueError, match="--masks"):
        Workload.parse("v1:4x128", mask="diagonal")
