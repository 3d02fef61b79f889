"""Launches and memory of a loss on a GPU, counted on CPU tensors without one.

A stand-in takes the place of the driver library (backend `cuda`) or of Triton's launches (backend `triton`), so that
kernels do nothing. PyTorch's operators are counted as launches, and those that would make the host wait for the device
raise an error.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_kernels import QKV, MiniLMLoss, MiniLMv2Loss
from minilm_kernels.relation import api, masks, ops, relation_kl_multi
from minilm_kernels.relation.backends import cuda_compiler
from minilm_kernels.relation.backends.triton import launch as triton_backend

B, S, A = 3, 70, 2
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")
_NO_LAUNCH = ("empty", "new_empty", "detach", "promote_types", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts PyTorch's operators that would launch a kernel, within this package's operators, too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace.startswith("minilm_kernels"):
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return function.redispatch(keys, *arguments, **(options or {}))
        name = function.__name__.split(".")[0]
        assert name not in _WAITS, f"the host waits in {name}"
        if name in ("index", "index_put", "index_put_"):
            boolean = [x for x in arguments[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            assert not boolean, "the host waits for an index of bools"
        is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns)
        if not is_view and not name.startswith(_NO_LAUNCH):
            self.found.append(name)
        return function(*arguments, **(options or {}))


def _host_waits(*_):
    raise AssertionError("the host reads values of the device")


@pytest.fixture(params=["cuda", "triton"])
def kernels(request, monkeypatch):
    """The kernels that the backend launches, and the backend's name."""
    launched: list[str] = []
    if request.param == "cuda":
        gpu = request.getfixturevalue("gpu")
        compiled = lambda names, *_, **__: dict.fromkeys(names, b"no code\0")  # noqa: E731
        monkeypatch.setattr(cuda_compiler, "compile_kernels", compiled)

        def record(name, function, *_):
            if name == "cuLaunchKernel":
                launched.append(gpu.driver.functions[function][1])

        with gpu.driver.recorded(record):
            yield launched, "cuda"
        return
    pytest.importorskip("triton", reason="Triton is not built for this platform")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    monkeypatch.setattr(triton_backend, "unavailable_reason", lambda: None)
    monkeypatch.setattr(triton_backend, "unsupported_reasons", lambda inputs: [])
    monkeypatch.setattr(triton_backend, "_start", lambda _device, kernel, *_: launched.append(kernel.__name__))
    yield launched, "triton"


@pytest.fixture
def unread(monkeypatch):
    """Values of tensors count as values on a device, which the host must not read."""
    for module in (masks, ops, api):
        monkeypatch.setattr(module, "host_readable", lambda _: False)
    monkeypatch.setattr(masks.Mask, "check_packing", lambda _: None)
    for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, _host_waits)


_BOUNDS = torch.arange(B + 1, dtype=torch.int32) * S
# Masks, and the launches of forward and backward: pairs, sum and backward, before them one for lists of tokens and one
# for weights.
MASKS = {
    "none": ({}, 3),
    "causal": ({"causal": True}, 3),
    "prefix": ({"prefix_lens": torch.arange(B)}, 3),
    "padding": ({"attention_mask": torch.ones(B, S, dtype=torch.int64)}, 5),
    "bool padding, not contiguous": ({"attention_mask": torch.ones(S, B, dtype=torch.bool).T}, 5),
    "prefix and padding": ({"prefix_lens": torch.arange(B).int(), "attention_mask": torch.ones(B, S).bool()}, 5),
    "rows": ({"query_mask": torch.ones(B, S, dtype=torch.bool)}, 5),
    "packed": ({"cu_seqlens": _BOUNDS, "max_seqlen": S}, 4),
    "packed causal": ({"cu_seqlens": _BOUNDS, "max_seqlen": S, "causal": True}, 4),
    "packed prefix": ({"cu_seqlens": _BOUNDS, "max_seqlen": S, "prefix_lens": torch.arange(B)}, 4),
    "packed rows": ({"cu_seqlens": _BOUNDS, "max_seqlen": S, "query_mask": torch.ones(B * S, dtype=torch.int64)}, 5),
}


def _models(kwargs: dict, heads: int = A) -> tuple[QKV, QKV]:
    shape = (B * S,) if "cu_seqlens" in kwargs else (B, S)
    teacher = QKV(*(torch.zeros(*shape, 16 * heads, dtype=torch.bfloat16) for _ in range(3)))
    return teacher, QKV(*(torch.zeros(*shape, 8 * heads, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)))


def _count(kernels: list[str], call, student) -> tuple[list[str], list[str]]:
    """Returns the kernels of the backend and PyTorch's operators in forward and backward. The first call compiles."""
    value, upstream = call()
    torch.autograd.grad(value, student, upstream)
    kernels.clear()
    with Launches() as launches:
        value, upstream = call()
        torch.autograd.grad(value, student, upstream)
    return list(kernels), launches.found


@pytest.mark.parametrize("mask", MASKS)
def test_launches_of_a_loss(kernels, unread, mask):
    """The upstream gradient is given: without it, PyTorch fills one with 1, which is another launch."""
    launched, backend = kernels
    kwargs, expected = MASKS[mask]
    teacher, student = _models(kwargs)
    loss, upstream = MiniLMv2Loss(A, relations={"qq": 1.0, "kk": 2.0, "vv": 0.5}, backend=backend), torch.ones(())
    own, others = _count(launched, lambda: (loss(teacher, student, **kwargs), upstream), student)
    assert others == []
    assert len(own) <= expected, own


@pytest.mark.parametrize("mask", ["none", "padding", "packed"])
def test_launches_of_relations(kernels, unread, mask):
    launched, backend = kernels
    kwargs, expected = MASKS[mask]
    teacher, student = _models(kwargs)
    pairs = [(name, name) for name in QKV._fields]

    def call():
        sides = ({name: x.unflatten(-1, (A, -1)) for name, x in side._asdict().items()} for side in (teacher, student))
        values = relation_kl_multi(*sides, pairs, backend=backend, **kwargs)
        return values, torch.ones(()).expand(3)

    own, others = _count(launched, call, student)
    assert set(others) <= {"ones"}
    assert len(own) <= expected, own


def test_gradients_of_several_relations_take_one_launch(kernels, unread):
    """MiniLM's loss and one in which each tensor has several gradients: one launch scales, adds and rounds them."""
    launched, backend = kernels
    teacher, student = _models({})
    relations = {"qq": 1.0, "qk": 1.0, "vq": 1.0, "kv": 1.0}
    upstream = torch.ones(())
    for loss in (MiniLMLoss(A, backend=backend), MiniLMv2Loss(A, relations=relations, backend=backend)):
        own, others = _count(launched, lambda loss=loss: (loss(teacher, student), upstream), student)
        assert others == []
        assert sum("scale" in name for name in own) == 1
        assert "scale" in own[-1]


def _peak(call) -> int:
    """Returns the largest number of bytes that are allocated at once during a call, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, live)
    del result
    return peak


@pytest.mark.parametrize("padded", [False, True])
def test_peak_memory_of_a_large_batch(kernels, unread, padded):
    """Stored gradients take 4 bytes per number of the student's tensors, and results 2. Memory is not touched."""
    _, backend = kernels
    batch, length, heads = 256, 512, 48
    kwargs = {"attention_mask": torch.ones(batch, length, dtype=torch.bool)} if padded else {}
    teacher = QKV(*(torch.empty(batch, length, 16 * heads, dtype=torch.bfloat16) for _ in range(3)))
    student = [torch.empty(batch, length, 8 * heads, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    loss = MiniLMv2Loss(heads, backend=backend)

    def call():
        return torch.autograd.grad(loss(teacher, QKV(*student), **kwargs), student)

    gradients = 3 * batch * length * 8 * heads
    assert 6 * gradients <= _peak(call) <= 0.9 * 2**30


def test_the_guard_sees_the_operators_of_pytorch():
    x = torch.ones(3)
    with Launches() as launches:
        (x.view(3, 1)[:, 0] * 2 + 1).to(torch.float64)
    assert launches.found == ["mul", "add", "_to_copy"]
    for read in (lambda: x[x > 0], lambda: x.sum().item(), lambda: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="the host waits"), Launches():
            read()
