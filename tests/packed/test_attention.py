"""`packed_attention` against softmax attention of single documents in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minilm_kernels.packed import cpu, cuda, packed_attention

LENGTHS = (5, 1, 0, 70, 1, 2, 33, 0)  # empty documents, single tokens, more than a block of queries under a window
# Sums of at most 70 products of width 8, and their gradients, in an order that may differ.
ROUNDING = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def borders(lengths: Any) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def operands(heads: int = 4, key_heads: int = 4, dtype: torch.dtype = torch.float64, lengths: Any = LENGTHS) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, 8) for n in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def alone(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """The definition for one document, (L, heads, width), with the visible pairs, (L, L)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def visible(length: int, causal: bool, window: int | None, prefix: int) -> Tensor:
    row, column = torch.arange(length)[:, None], torch.arange(length)
    seen = (row >= column) | (column < prefix) if causal else torch.ones(length, length, dtype=torch.bool)
    return seen if window is None else seen & ((row - column).abs() <= window)


def expected(inputs: list[Tensor], *, causal: bool = False, window: int | None = None, prefixes: Any = None) -> Tensor:
    parts = zip(*(x.double().split(LENGTHS) for x in inputs), strict=True)
    prefixes = [0] * len(LENGTHS) if prefixes is None else prefixes
    return torch.cat(
        [alone(*part, visible(len(part[0]), causal, window, p)) for part, p in zip(parts, prefixes, strict=True)]
    )


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    largest = max(y.abs().max() for y in wanted)  # gradients may be 0
    for x, y in zip(found, wanted, strict=True):
        assert (x.double() - y.double()).abs().max() <= tolerance * largest


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window": 3}, {"window": 40}, {"window": 0}, {"causal": True, "window": 5}]
)
def test_documents_attend_to_themselves(mask: Any, key_heads: int, dtype: torch.dtype) -> None:
    inputs = operands(key_heads=key_heads, dtype=dtype)
    output = packed_attention(*inputs, borders(LENGTHS), 70, **mask)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((output.double() * weights).sum(), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = expected(exact, **mask)
    assert output.dtype == dtype
    close([output, *found], [wanted, *torch.autograd.grad((wanted * weights).sum(), exact)], ROUNDING[dtype])


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 9])
def test_a_prefix_is_seen_by_the_whole_document(window: int | None, key_heads: int) -> None:
    inputs, prefixes = operands(key_heads=key_heads), [2, 1, 0, 30, 0, 2, 33, 0]
    output = packed_attention(*inputs, borders(LENGTHS), 70, prefix_lens=torch.tensor(prefixes), window=window)
    wanted = expected(inputs, causal=True, window=window, prefixes=prefixes)
    weights = torch.randn_like(output)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (output, wanted)]
    close([output, *gradients[0]], [wanted, *gradients[1]], 1e-13)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_scale_and_layout(dropout: float, order: tuple[int, int, int]) -> None:
    """Operands with any order of dimensions in memory, and an expanded gradient."""
    back = [order.index(i) for i in range(3)]
    inputs = [x.detach().permute(order).contiguous().permute(back).requires_grad_() for x in operands()]
    parts = zip(*(x.split(LENGTHS) for x in inputs), strict=True)
    wanted = torch.cat([alone(*part, visible(len(part[0]), False, None, 0), 0.7) for part in parts])
    found = packed_attention(*inputs, borders(LENGTHS), 99, scale=0.7, dropout=dropout)
    gradients = [torch.autograd.grad(x.sum(), inputs) for x in (found, wanted)]
    close([found, *gradients[0]], [wanted, *gradients[1]], 1e-13 if not dropout else 1e-8)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": 5}, {"causal": True, "window": 5}])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_dropout_keeps_what_the_operator_has_kept(mask: Any, key_heads: int, monkeypatch: Any) -> None:
    """With values of one-hot rows, the output is the dropped probabilities themselves; gradients follow from them."""
    lengths, width = (8, 3, 1), 8
    query, key, _ = operands(key_heads=key_heads, lengths=lengths)
    value = torch.cat([torch.eye(width, dtype=torch.float64)[:n] for n in lengths])[:, None].repeat(1, key_heads, 1)
    monkeypatch.setattr(cpu, "_DROPOUT_BLOCK", 3)
    torch.manual_seed(5)
    dropped = packed_attention(query, key, value, borders(lengths), 8, dropout=0.4, **mask)  # (T, heads, keys)
    whole = packed_attention(query, key, value, borders(lengths), 8, **mask)
    kept = torch.where(whole > 0, dropped / whole, 0.0).detach()
    assert set(kept.round(decimals=9).unique().tolist()) == {0.0, round(1 / 0.6, 9)}
    value = operands(key_heads=key_heads, lengths=lengths)[2]
    inputs = [query, key, value]
    torch.manual_seed(5)
    output = packed_attention(*inputs, borders(lengths), 8, dropout=0.4, **mask)

    def by_definition() -> Tensor:
        parts, start = [], 0
        for n in lengths:
            s = slice(start, start + n)
            k, v = (x[s].repeat_interleave(4 // key_heads, 1) for x in (key, value))
            scores = torch.einsum("ihd,jhd->hij", query[s], k) * width**-0.5
            seen = visible(n, mask.get("causal", False), mask.get("window"), 0)
            p = scores.masked_fill(~seen, -torch.inf).softmax(-1) * kept[s, :, :n].transpose(0, 1)
            parts.append(torch.einsum("hij,jhd->ihd", p, v))
            start += n
        return torch.cat(parts)

    wanted, weights = by_definition(), torch.randn_like(output)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (output, wanted)]
    close([output, *gradients[0]], [wanted, *gradients[1]], 1e-13)


def test_dropout_has_its_share_and_its_seed() -> None:
    inputs = [x.detach().float() for x in operands(lengths=(400,))]
    inputs[2] = torch.ones_like(inputs[2])
    torch.manual_seed(1)
    first = packed_attention(*inputs, borders([400]), 400, dropout=0.1)
    again = packed_attention(*inputs, borders([400]), 400, dropout=0.1)
    torch.manual_seed(1)
    assert torch.equal(first, packed_attention(*inputs, borders([400]), 400, dropout=0.1))
    assert not torch.equal(first, again)
    # The sum of a row's probabilities: mean 1; 1600 rows of some 100 effective keys give a standard error below 1e-3.
    assert first[..., 0].mean().item() == pytest.approx(1, abs=5e-3)
    assert first[..., 0].std().item() > 0.01


def test_operator_is_registered_as_torch_expects() -> None:
    inputs = operands(key_heads=2, dtype=torch.float64, lengths=(4, 3))
    for seed, dropout in ((None, 0.0), (torch.tensor(3), 0.5)):
        arguments = (*inputs, borders((4, 3)), seed, 4, 0.3, True, -1, dropout)
        torch.library.opcheck(cpu.attend, arguments)


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(("window", "dropout"), [(None, 0.0), (64, 0.0), (None, 0.1)])
def test_nothing_of_s_by_s_is_allocated(window: int | None, dropout: float) -> None:
    lengths = (4096, 1)  # 4097 tokens
    inputs = operands(1, 1, torch.float32, lengths)
    with Largest() as seen:
        output = packed_attention(*inputs, borders(lengths), 4096, window=window, dropout=dropout)
        torch.autograd.grad(output.sum(), inputs)
        # The operators run below this mode; their implementations are called in it.
        rest = (borders(lengths), torch.tensor(0) if dropout else None, 4096, 0.3, False, -1 if window is None else 64)
        with torch.no_grad():
            raw, lse = cpu.attend._init_fn(*inputs, *rest, dropout)
            cpu.attend_backward._init_fn(raw, *inputs, raw, lse, *rest, dropout)
    block = 4096 * (256 if dropout else 8)
    assert 4097 * 8 <= seen.elements <= block + 8 * 4097


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(2, 4)}, ValueError, r"expected query \(T, heads, width\).*query \(2, 4\)"),
        ({"key": torch.zeros(2, 3, 8), "value": torch.zeros(2, 3, 8)}, ValueError, "key heads that divide the heads"),
        ({"key": torch.zeros(3, 4, 8), "value": torch.zeros(3, 4, 8)}, ValueError, "equal T and width"),
        ({"value": torch.zeros(2, 4, 16)}, ValueError, r"value \(2, 4, 16\)"),
        ({"value": torch.zeros(2, 4, 8).double()}, TypeError, "one floating-point dtype, got .*torch.float64"),
        (
            {"query": torch.zeros(2, 4, 8, device="meta")},
            ValueError,
            "expected one device, got query on meta, key on cpu",
        ),
        ({"cu_seqlens": torch.tensor([0, 2])}, TypeError, "cu_seqlens: expected int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, ValueError, r"cu_seqlens: expected \(N \+ 1,\)"),
        ({"cu_seqlens": borders([3])}, ValueError, r"rise from 0 to the 2 tokens, got \[0, 3\]"),
        ({"cu_seqlens": borders([3, -1])}, ValueError, "rise from 0 to the 2 tokens"),
        ({"max_seqlen": 1}, ValueError, "max_seqlen=1: the longest document has 2 tokens"),
        ({"window": -1}, ValueError, "window=-1"),
        ({"dropout": 1.0}, ValueError, r"dropout=1.0: expected a share in \[0, 1\)"),
        ({"prefix_lens": torch.tensor([1, 1])}, ValueError, r"prefix_lens: expected \(1,\).*got \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(change: Any, error: type[Exception], words: str) -> None:
    arguments = {name: torch.zeros(2, 4, 8) for name in ("query", "key", "value")}
    with pytest.raises(error, match=words):
        packed_attention(**{**arguments, "cu_seqlens": borders([2]), "max_seqlen": 2, **change})


def test_devices() -> None:
    with FakeTensorMode():
        inputs = [torch.empty(2, 4, 8, device="mps") for _ in range(3)]
        with pytest.raises(ValueError, match="runs on cpu and cuda, got a tensor on mps"):
            packed_attention(*inputs, torch.empty(2, dtype=torch.int32, device="mps"), 2)
    output = packed_attention(*(x.to("meta") for x in operands()), borders(LENGTHS).to("meta"), 70)  # shapes alone
    assert (output.shape, output.device.type) == ((sum(LENGTHS), 4, 8), "meta")


class TestCuda:
    """The choice of a kernel and its arguments, with stand-ins that compute on the CPU."""

    @pytest.fixture(params=[False, True], ids=["without flash-attn", "with flash-attn"])
    def installed(self, request: Any, monkeypatch: Any) -> bool:
        monkeypatch.setattr(cuda, "_flash_attention", lambda: self.flash_attn if request.param else None)
        return request.param

    def test_kernels(self, installed: bool) -> None:
        half = "flash_attn" if installed else "varlen"
        assert cuda.kernel(torch.bfloat16, -1, 0.0) == half
        assert cuda.kernel(torch.float16, 5, 0.0) == half
        assert cuda.kernel(torch.float16, -1, 0.1) == ("flash_attn" if installed else "efficient")
        assert cuda.kernel(torch.float32, -1, 0.1) == "efficient"
        with pytest.raises(ValueError, match=r"windows in torch.float32.*--bf16.*--attention mask"):
            cuda.kernel(torch.float32, 5, 0.0)
        with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16, got torch.float64"):
            cuda.kernel(torch.float64, -1, 0.0)
        if not installed:
            with pytest.raises(ValueError, match=r"dropout 0.1; set --dropout 0, or install flash-attn"):
                cuda.kernel(torch.bfloat16, 5, 0.1)

    @staticmethod
    def by_definition(q: Any, k: Any, v: Any, cu: Tensor, left: int, right: int, scale: float) -> Tensor:
        assert cu.dtype == torch.int32
        parts = []
        for a, b in pairwise(cu.tolist()):
            distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
            seen = (distance <= (left if left >= 0 else b)) & (-distance <= (right if right >= 0 else b))
            parts.append(alone(q[a:b].double(), k[a:b].double(), v[a:b].double(), seen, scale).to(q.dtype))
        return torch.cat(parts)

    def flash_attn(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, most_q: int, most_k: int, **kw: Any) -> Tensor:
        assert set(kw) == {"dropout_p", "softmax_scale", "causal", "window_size", "deterministic"}
        assert (most_q, most_k, kw["deterministic"]) == (70, 70, False)
        assert torch.equal(cu_q, cu_k)
        left, right = kw["window_size"]
        return self.by_definition(q, k, v, cu_q, left, 0 if kw["causal"] else right, kw["softmax_scale"])

    def varlen(
        self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, most_q: int, most_k: int, *, enable_gqa=False, **kw: Any
    ) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return self.older_varlen(q, k, v, cu_q, cu_k, most_q, most_k, **kw)

    def older_varlen(self, q: Any, k: Any, v: Any, cu_q: Any, _: Any, __: int, ___: int, **kw: Any) -> Tensor:
        """Knows `enable_gqa` as little as torch 2.11."""
        assert set(kw) == {"scale", "window_size"}
        return self.by_definition(q, k, v, cu_q, *kw["window_size"], kw["scale"])

    def efficient(self, q: Any, k: Any, v: Any, bias: None, cu_q: Any, cu_k: Any, *rest: Any, scale: float) -> Any:
        most_q, most_k, dropout, kind, with_lse = rest
        assert (bias, most_q, most_k, dropout, with_lse) == (None, 70, 70, 0.0, True)
        assert q.shape == k.shape == v.shape
        assert q.shape[0] == 1
        output = self.by_definition(q[0], k[0], v[0], cu_q, -1, 0 if kind else -1, scale)
        lse, seed, offset = torch.tensor(5.0), torch.tensor(6), torch.tensor(7)
        return output[None], lse, seed, offset, 70, 70

    def efficient_backward(self, grad: Any, q: Any, k: Any, v: Any, bias: None, *rest: Any, scale: float) -> Any:
        out, cu_q, _, most_q, most_k, lse, dropout, seed, offset, kind, bias_grad = rest
        assert (bias, most_q, most_k, dropout, bias_grad) == (None, 70, 70, 0.0, False)
        assert (lse, seed, offset) == (5, 6, 7)

        def gradients() -> Any:
            inputs = [x[0].detach().requires_grad_() for x in (q, k, v)]
            output = self.by_definition(*inputs, cu_q, -1, 0 if kind else -1, scale)
            return output.detach(), torch.autograd.grad(output, inputs, grad[0])

        with ThreadPoolExecutor() as pool:  # inside an operator, this thread records no graph
            output, found = pool.submit(gradients).result(timeout=600)
        assert torch.equal(output, out[0])
        return *(x[None] for x in found), torch.empty(())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("key_heads", [4, 2])
    @pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": 3}, {"causal": True, "window": 3}])
    def test_arguments(self, mask: Any, key_heads: int, dtype: Any, installed: bool, monkeypatch: Any) -> None:
        if dtype == torch.float32 and "window" in mask:
            return
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", self.varlen)
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", self.efficient)
        monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", self.efficient_backward)
        inputs = operands(key_heads=key_heads, dtype=dtype)
        options = (70, 8**-0.5, mask.get("causal", False), mask.get("window", -1), 0.0)
        found = cuda.attend(*inputs, borders(LENGTHS), *options)
        wanted, weights = expected(inputs, **mask), torch.randn(found.shape)
        gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted)]
        close([found, *gradients[0]], [wanted, *gradients[1]], ROUNDING[dtype])

    def test_grouped_heads_without_an_argument_for_them(self, monkeypatch: Any) -> None:
        def varlen(q: Any, k: Any, v: Any, *others: Any, scale: float, window_size: Any) -> Tensor:
            assert q.shape == k.shape == v.shape
            return self.older_varlen(q, k, v, *others, scale=scale, window_size=window_size)

        monkeypatch.setattr(cuda, "_flash_attention", lambda: None)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
        inputs = operands(key_heads=2, dtype=torch.bfloat16)
        found = cuda.attend(*inputs, borders(LENGTHS), 70, 8**-0.5, False, -1, 0.0)
        close([found], [expected(inputs)], ROUNDING[torch.bfloat16])

    def test_stand_ins_have_the_arguments_of_torch(self) -> None:
        import inspect

        from torch.nn.attention.varlen import varlen_attn

        arguments = inspect.signature(varlen_attn)
        arguments.bind(*range(7), scale=1.0, window_size=(-1, 0))
        assert ("enable_gqa" in arguments.parameters) == (torch.__version__ >= (2, 12))
        forward, backward = (
            [argument.name for argument in operator.default._schema.arguments]
            for operator in (torch.ops.aten._efficient_attention_forward, torch.ops.aten._efficient_attention_backward)
        )
        borders = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
        wanted = f"query key value bias {borders} dropout_p custom_mask_type compute_log_sumexp scale"
        assert forward[:12] == wanted.split()
        wanted = f"grad_out_ query key value bias out {borders} logsumexp dropout_p philox_seed philox_offset"
        assert backward[:17] == [*wanted.split(), "custom_mask_type", "bias_requires_grad", "scale"]

    @pytest.mark.parametrize("key_heads", [4, 2])
    @pytest.mark.parametrize(
        ("dtype", "dropout", "window"),
        [(torch.float32, 0.1, -1), (torch.bfloat16, 0.0, -1), (torch.bfloat16, 0.0, 5), (torch.float16, 0.1, -1)],
    )
    @pytest.mark.parametrize("causal", [False, True])
    def test_torch_accepts_and_differentiates_them(
        self, key_heads: int, dtype: torch.dtype, dropout: float, window: int, causal: bool, monkeypatch: Any
    ) -> None:
        """Shapes alone, on the meta device."""
        monkeypatch.setattr(cuda, "_flash_attention", lambda: None)
        inputs = [x.detach().to("meta").requires_grad_() for x in operands(key_heads=key_heads, dtype=dtype)]
        output = cuda.attend(*inputs, borders(LENGTHS).to("meta"), 70, 0.3, causal, window, dropout)
        assert (output.shape, output.dtype) == (inputs[0].shape, dtype)
        gradients = torch.autograd.grad(output.sum(), inputs)
        assert [x.shape for x in gradients] == [x.shape for x in inputs]
