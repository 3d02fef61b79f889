"""The CUDA kernels on a GPU, in addition to the contract tests: no synchronization, graph capture, determinism."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from minilm_kernels import backend_status, relation_kl
from minilm_kernels.relation.api import relation_kl_multi
from tests.relation.cases import MASKS, Case, dense, error, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backend_status()["cuda"] != "ready", reason=str(backend_status()["cuda"])),
]

_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("reduction", ["sequence", "none"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_waits_for_the_device(mask, cross, reduction):
    case = make(mask, cross=cross).on("cuda")
    upstream = torch.ones(case.row_shape() if reduction == "none" else (), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(reduction, "cuda", upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_a_call_can_be_captured_in_a_graph(dtype):
    names = (("q", 16), ("k", 16), ("v", 16))
    teacher = {name: torch.randn(2, 200, 4, width, device="cuda", dtype=dtype) for name, width in names}
    student = {name: torch.randn(2, 200, 4, width // 2, device="cuda", dtype=dtype) for name, width in names}
    leaves = {name: x.requires_grad_() for name, x in student.items()}
    mask = torch.rand(2, 200, device="cuda") < 0.8
    pairs = [("q", "q"), ("q", "k"), ("v", "v")]

    def step() -> list[torch.Tensor]:
        values = relation_kl_multi(teacher, leaves, pairs, attention_mask=mask, backend="cuda")
        return [values, *torch.autograd.grad(values.sum(), list(leaves.values()))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in (*teacher.values(), *leaves.values()):
        x.data.normal_()
    mask.bernoulli_(0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [40, 512, 1000, 3000])
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_the_same_bits_every_time(dtype, length):
    """Many blocks at once, to detect races that the emulation does not reproduce."""
    for cross in (False, True):
        case = make(batch=4, length=length, heads=8, widths=(16, 8), dtype=dtype, cross=cross).on("cuda")
        value, grads = case.run("sequence", "cuda")
        for _ in range(5):
            again, again_grads = case.run("sequence", "cuda")
            assert torch.equal(again, value)
            assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))


@pytest.mark.parametrize("length", [64, 100, 512, 513, 2049])
def test_float32_is_as_good_as_dense_pytorch(length):
    """The contract's limit at lengths of the symmetric path: twice the error of dense PyTorch, plus one rounding.

    In the emulation, whose tensor cores err as much as their documentation allows, the errors are a third of the limit.
    """
    unit = torch.finfo(torch.float32).eps
    for cross in (False, True):
        case = make(batch=1, length=length, heads=2, widths=(16, 8), cross=cross)
        rows, dense_grads = dense(case, torch.full(case.row_shape(), 0.5 / length))
        expected, expected_grads = case.oracle("sequence")
        value, grads = case.on("cuda").run("sequence", "cuda")
        assert error(value.cpu(), expected) <= 2 * error(rows, case.oracle("none")[0]) + unit
        allowed = 2 * max(error(g, e) for g, e in zip(dense_grads, expected_grads, strict=True)) + unit
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad.cpu(), expected_grad) <= allowed


def test_another_stream_and_another_device():
    case = make("holes").on("cuda")
    expected, _ = case.run("sequence", "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value, _ = case.run("sequence", "cuda")
    stream.synchronize()
    assert torch.equal(value, expected)
    if torch.cuda.device_count() > 1:
        value, _ = make("holes").on("cuda:1").run("sequence", "cuda")
        assert torch.equal(value.cpu(), expected.cpu())


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_host_threads_with_different_lengths(backend):
    """Threads that launch kernels of different sizes of shared memory at the same time, each on its own stream."""
    dtype = torch.bfloat16
    cases = [make(batch=2, length=n, heads=4, widths=(16, 8), dtype=dtype).on("cuda") for n in (40, 300, 1000, 2000)]
    expected = [case.run("sequence", backend) for case in cases]
    torch.cuda.synchronize()

    def repeat(case: Case) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [case.run("sequence", backend) for _ in range(50)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(cases)) as pool:
        for (value, (grad,)), results in zip(expected, pool.map(repeat, cases), strict=True):
            for again, (again_grad,) in results:
                assert torch.equal(again, value)
                assert torch.equal(again_grad, grad)


def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(RuntimeError, match="computes on cuda devices, but the tensors are on cpu"):
        make().run("sum", "cuda")


def test_more_than_two_billion_elements():
    """64-bit offsets: the last sequence of a tensor with more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")
    heads, width = 48, 16
    batch = 2**31 // (512 * heads * width) + 2
    teacher = torch.zeros(batch, 512, heads, width, dtype=torch.bfloat16, device="cuda")
    student = torch.zeros(batch, 512, heads, 8, dtype=torch.bfloat16, device="cuda")
    teacher[-1].normal_()
    student[-1].normal_()
    rows = relation_kl(teacher, None, student, None, reduction="none", backend="cuda")
    alone = relation_kl(teacher[-1:], None, student[-1:], None, reduction="none", backend="cuda")
    assert torch.equal(rows[-1:], alone)
    assert not rows[:-1].any()


def test_a_case_on_the_device_equals_the_reference():
    case: Case = make("prefix-holes", widths=(64, 32), dtype=torch.bfloat16)
    expected, (expected_grad,) = case.oracle("sequence")
    value, (grad,) = case.on("cuda").run("sequence", "cuda")
    assert error(value.cpu(), expected) < 1e-5
    assert error(grad.cpu(), expected_grad) < 1e-2
