"""Contract tests: every backend matches the reference in every mask mode, dtype, layout and size.

The tolerance is twice the error of dense PyTorch in the same dtype against float64, plus one rounding of the result.
The error of dense PyTorch is measured on a full batch of the same distribution.
"""

from dataclasses import replace

import pytest
import torch

from minilm_kernels import relation_kl
from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation import relation_kl_multi

from .cases import MALFORMED, MASKS, Case, all_nan, dense, error, make, malformed


def _upstream(case: Case, reduction: str) -> torch.Tensor:
    shape = case.row_shape() if reduction == "none" else ()
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5


def _yardstick(dtype: torch.dtype, cross: bool, widths: tuple[int, int]) -> tuple[float, float]:
    """Returns the allowed relative errors of rows and gradients: twice the error of the dense loss, plus one rounding.

    For float64 there is no more precise oracle. A few dozen roundings are allowed, as many as the longest sums have.
    """
    if dtype == torch.float64:
        return 64 * torch.finfo(dtype).eps, 64 * torch.finfo(dtype).eps
    case = make(cross=cross, widths=widths, dtype=dtype, seed=11)
    upstream = _upstream(case, "none")
    rows, grads = dense(case, upstream)
    expected_rows, expected_grads = case.oracle("none", upstream)
    worst = max(error(g, e) for g, e in zip(grads, expected_grads, strict=True))
    return 2 * error(rows, expected_rows) + torch.finfo(torch.float32).eps, 2 * worst + torch.finfo(dtype).eps


def _check(case: Case, reduction: str, backend: str, widths=(12, 6), dtype=torch.float32) -> None:
    cross = case.tensors[1] is not None
    allowed_value, allowed_grad = _yardstick(dtype, cross, widths)
    upstream = _upstream(case, reduction)
    value, grads = case.run(reduction, backend, upstream)
    expected, expected_grads = case.oracle(reduction, upstream)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == expected.shape
    assert error(value, expected) <= allowed_value
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.shape == expected_grad.shape
        assert error(grad, expected_grad) <= allowed_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_reductions(backend, device, mask, cross, reduction):
    _check(make(mask, cross=cross).on(device), reduction, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("widths", [(16, 8), (16, 6), (64, 32), (1, 128), (31, 17)], ids=str)
def test_dtypes_and_widths(backend, device, dtype, widths):
    for cross in (False, True):
        case = make(cross=cross, widths=widths, dtype=dtype).on(device)
        if dtype == torch.float64 and backend != "torch":
            with pytest.raises(RuntimeError, match="float64"):
                case.run("none", backend)
            continue
        _check(case, "none", backend, widths, dtype)
        _check(case, "sequence", backend, widths, dtype)


def test_teacher_and_student_dtypes_are_independent(backend, device):
    case = make("holes").on(device)
    q_t, _, q_s, _ = case.tensors
    for teacher, student in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        mixed = Case((q_t.to(teacher), None, q_s.to(student), None), case.kwargs)
        value, (grad,) = mixed.run("token", backend)
        expected, (expected_grad,) = mixed.oracle("token")
        assert value.dtype == torch.float32
        assert grad.dtype == student
        assert error(value, expected) < 1e-6
        assert error(grad, expected_grad) <= _yardstick(student, False, (12, 6))[1]


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 130, 257])
def test_lengths(backend, device, length):
    case = make({"causal": length % 2 == 0}, batch=2, length=length, heads=2).on(device)
    value, (grad,) = case.run("sum", backend)
    expected, (expected_grad,) = case.oracle("sum")
    allowed_value, allowed_grad = _yardstick(torch.float32, False, (12, 6))
    assert (value - expected).abs() <= allowed_value * expected.abs()
    assert (grad - expected_grad).norm() <= allowed_grad * expected_grad.norm()


def test_4097_tokens(backend, device):
    mask = torch.ones(1, 4097, dtype=torch.bool)
    mask[0, 1000:1100] = False
    _check(
        make({"attention_mask": mask}, batch=1, length=4097, heads=1, widths=(16, 8)).on(device), "sequence", backend
    )


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_many_short_sequences_among_long_ones(backend, device, reduction):
    lengths = torch.tensor([300, *[3, 1, 0, 17] * 40, 299, 64])
    case = make({"cu_seqlens": torch.cat((torch.zeros(1), lengths.cumsum(0))).int()}).on(device)
    _check(case, reduction, backend)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_prefixes_of_long_sequences(backend, device, packed, cross):
    """Prefixes end inside a block of rows, after the first block, and with the sequence."""
    mask = {"prefix_lens": torch.tensor([200, 30, 257])}
    if packed:
        mask["cu_seqlens"] = torch.tensor([0, 257, 514, 771], dtype=torch.int32)
    _check(make(mask, batch=3, length=257, heads=1, cross=cross).on(device), "sequence", backend)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_upstream_gradients_of_either_sign(backend, device, cross):
    case = make("holes", cross=cross).on(device)
    upstream = torch.randn(case.row_shape(), generator=torch.Generator().manual_seed(3)).to(device)
    _, grads = case.run("none", backend, upstream)
    _, expected = case.oracle("none", upstream)
    allowed = _yardstick(torch.float32, cross, (12, 6))[1]
    assert all(error(g, e) <= allowed for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("mask", ["none", "prefix-holes", "packed-prefix"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_defaults_of_the_process_change_nothing(backend, device, default, mask):
    """The operator does not depend on the default dtype and device, which code that builds models may change."""
    case = make(mask, cross=True, heads=2).on(device)
    upstream = _upstream(case, "none").to(device)
    dtype, default_device = torch.get_default_dtype(), torch.get_default_device()
    for reduction, weights in (("sequence", None), ("none", upstream)):
        value, grads = case.run(reduction, backend, weights)
        try:
            torch.set_default_device("meta") if default == "meta" else torch.set_default_dtype(default)
            again, again_grads = case.run(reduction, backend, weights)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_default_device(None if default_device.type == "cpu" else default_device)
        assert torch.equal(again, value)
        assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", [name for name in MASKS if "attention_mask" in MASKS[name]])
def test_padding_never_matters(backend, device, mask, reduction):
    case = make(mask, cross=True).on(device)
    real = (case.kwargs["attention_mask"] != 0)[..., None, None]
    upstream = _upstream(case, reduction).to(device)
    expected, expected_grads = case.run(reduction, backend, upstream)
    for poison in (float("nan"), float("inf"), -float("inf"), 3e38):
        poisoned = Case(tuple(torch.where(real, x, poison) for x in case.tensors), case.kwargs)
        if reduction == "none":
            row_real = real[..., 0].transpose(-1, -2)
            upstream = torch.where(row_real, upstream, float("nan"))
        value, grads = poisoned.run(reduction, backend, upstream)
        assert torch.equal(value, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert torch.equal(grad, expected_grad)
            assert not grad.masked_select(~real).any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("mask", MASKS)
def test_rows_that_count(backend, device, mask, cross, reduction):
    """Every mask together with a query mask, and in cross relations with grouped keys."""
    case = make(mask, cross=cross, heads=6, rows=0.6, groups=(2, 3)).on(device)
    _check(case, reduction, backend)


@pytest.mark.parametrize("mask", ["none", "prefix-holes", "packed-causal"])
@pytest.mark.parametrize("groups", [(1, 6), (6, 1), (3, 3)], ids=str)
def test_grouped_keys(backend, device, mask, groups):
    case = make(mask, cross=True, heads=6, groups=groups).on(device)
    for reduction in ("sequence", "none"):
        _check(case, reduction, backend)


@pytest.mark.parametrize("share", [0.1, 0.95])
@pytest.mark.parametrize("kind", ["self", "cross", "grouped"])
@pytest.mark.parametrize("length", [1, 2, 65, 130, 257])
def test_rows_and_groups_of_any_length(backend, device, length, kind, share):
    groups = (2, 4) if kind == "grouped" else (1, 1)
    mask = {65: {"causal": True}, 130: {"prefix_lens": torch.tensor([70, 3])}}.get(length, {})
    case = make(mask, batch=2, length=length, heads=4, cross=kind != "self", groups=groups, rows=share).on(device)
    for reduction in ("token", "none"):
        _check(case, reduction, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(16, 8), (16, 6), (64, 32)], ids=str)
def test_rows_and_groups_in_half_precision(backend, device, widths, dtype):
    for cross in (False, True):
        case = make("holes", cross=cross, widths=widths, dtype=dtype, heads=4, rows=0.7, groups=(2, 4)).on(device)
        _check(case, "none", backend, widths, dtype)
        _check(case, "sequence", backend, widths, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", ["none", "prefix-holes", "packed-causal"])
def test_a_query_mask_of_all_rows_changes_no_bit(backend, device, mask, reduction):
    for cross in (False, True):
        case = make(mask, cross=cross).on(device)
        every = replace(case, kwargs=case.kwargs | {"query_mask": torch.ones(case.token_shape(), device=device)})
        value, grads = every.run(reduction, backend)
        expected, expected_grads = case.run(reduction, backend)
        assert torch.equal(value, expected)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", ["none", "holes", "packed-prefix"])
def test_no_row_counts(backend, device, mask, reduction):
    for cross in (False, True):
        case = make(mask, cross=cross, heads=4, rows=0.0, groups=(2, 4))
        case.kwargs["query_mask"][...] = False
        case = case.on(device)
        value, grads = case.run(reduction, backend)
        assert not any(x.any() for x in (value, *grads))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", ["none", "causal-holes", "packed-prefix"])
def test_queries_that_do_not_count_never_matter(backend, device, mask, reduction):
    case = make(mask, cross=True, heads=4, rows=0.6, groups=(2, 4)).on(device)
    valid = case.kwargs.get("attention_mask", torch.ones(case.token_shape(), device=device)) != 0
    counted = (case.kwargs["query_mask"] & valid)[..., None, None]
    valid = valid[..., None, None]
    upstream = _upstream(case, reduction).to(device)
    expected, expected_grads = case.run(reduction, backend, upstream)
    assert not expected_grads[0].masked_select(~counted).any()
    if reduction == "none":
        upstream = torch.where(counted[..., 0].transpose(-1, -2), upstream, float("nan"))
    for poison in (float("nan"), float("inf"), -float("inf"), 3e38):
        tensors = [torch.where((counted, valid)[n % 2], x, poison) for n, x in enumerate(case.tensors)]
        value, grads = Case(tuple(tensors), case.kwargs).run(reduction, backend, upstream)
        assert torch.equal(value, expected)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


def test_any_dtype_of_a_query_mask(backend, device):
    case = make("holes", cross=True, rows=0.6).on(device)
    expected, _ = case.run("sequence", backend)
    rows = case.kwargs["query_mask"]
    dtypes = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    for mask in (*(rows.to(dtype) for dtype in dtypes), -rows.long(), 7 * rows.int(), rows.mT.contiguous().mT):
        assert torch.equal(Case(case.tensors, case.kwargs | {"query_mask": mask}).run("sequence", backend)[0], expected)


def test_several_relations_with_rows_and_groups(backend, device):
    """Self relations and cross relations, with and without grouped keys, in one call; each has its own weight."""
    case = make("holes", cross=True, heads=4, rows=0.6, groups=(2, 4)).on(device)
    other = make("holes", cross=True, heads=4, seed=1).on(device)
    names, pairs = "qkv", [("q", "q"), ("q", "k"), ("v", "k"), ("v", "q"), ("v", "v")]
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.25, 0.0], device=device)
    results = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        (q_t, k_t, q_s, k_s), (v_t, _, v_s, _) = case.to(dtype).tensors, other.to(dtype).tensors
        teacher = dict(zip(names, (q_t, k_t, v_t), strict=True))
        student = {n: x.detach().requires_grad_() for n, x in zip(names, (q_s, k_s, v_s), strict=True)}
        values = relation_kl_multi(teacher, student, pairs, backend=name, **case.kwargs)
        values.backward(upstream.to(values))
        results.append((values.detach(), *(x.grad for x in student.values())))
    assert all(error(got, expected) < 1e-5 for got, expected in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["bidirectional", "causal", "prefix"])
def test_packed_equals_padded(backend, device, kind):
    padded = make({"bidirectional": "right", "causal": "right", "prefix": "prefix"}[kind], cross=True)
    real = MASKS["right"]["attention_mask"]
    shared = {"causal": kind == "causal"} | (
        {"prefix_lens": MASKS["prefix"]["prefix_lens"]} if kind == "prefix" else {}
    )
    padded = Case(padded.tensors, {"attention_mask": real, **shared}).on(device)
    packed = Case(
        tuple(x[real.to(device)] for x in padded.tensors), {"cu_seqlens": MASKS["packed"]["cu_seqlens"], **shared}
    ).on(device)
    for reduction in ("sequence", "token", "sum"):
        value, grads = padded.run(reduction, backend)
        packed_value, packed_grads = packed.run(reduction, backend)
        torch.testing.assert_close(packed_value, value)
        for grad, packed_grad in zip(grads, packed_grads, strict=True):
            torch.testing.assert_close(packed_grad, grad[real.to(device)])


def test_prefix_of_zero_is_causal_and_of_everything_is_bidirectional(backend, device):
    case = make("none").on(device)

    def rows(**kwargs):
        return Case(case.tensors, kwargs).on(device).run("none", backend)[0]

    batch, length = case.tensors[0].shape[:2]
    nothing, everything = torch.zeros(batch, dtype=torch.long), torch.full((batch,), length)
    torch.testing.assert_close(rows(prefix_lens=nothing), rows(causal=True))
    torch.testing.assert_close(rows(prefix_lens=everything), rows())
    torch.testing.assert_close(rows(prefix_lens=everything, causal=True), rows())
    torch.testing.assert_close(rows(prefix_lens=-nothing - 5), rows(causal=True))


def test_self_path_equals_cross_path(backend, device):
    for mask in MASKS:
        case = make(mask).on(device)
        q_t, _, q_s, _ = case.tensors
        value, (grad,) = case.run("sequence", backend)
        other, grads = Case((q_t, q_t.clone(), q_s, q_s.clone()), case.kwargs).run("sequence", backend)
        torch.testing.assert_close(other, value)
        torch.testing.assert_close(sum(grads), grad)


def test_any_dtype_of_a_mask(backend, device):
    """Masks are 0 and 1 in any dtype, or 0 and any other value in an integer dtype."""
    case = make("holes").on(device)
    real = case.kwargs["attention_mask"] != 0
    expected, _ = case.run("sequence", backend)
    dtypes = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64)
    for mask in (*(real.to(dtype) for dtype in dtypes), -real.long(), 7 * real.int()):
        assert torch.equal(Case(case.tensors, {"attention_mask": mask}).run("sequence", backend)[0], expected)


def test_one_student_tensor_as_query_and_key(backend, device):
    """One student tensor is query and key, while the teacher's tensors differ. Both gradients are added."""
    case = make("holes", cross=True).on(device)
    q_t, k_t, q_s, _ = case.tensors
    case = Case((q_t, k_t, q_s, q_s), case.kwargs)
    value, (grad,) = case.run("sequence", backend)
    expected, (expected_grad,) = case.oracle("sequence")
    assert error(value, expected) < 1e-6
    assert error(grad, expected_grad) < 1e-5


def test_heads_and_sequences_are_independent(backend, device):
    case = make("holes").on(device)
    rows, (grad,) = case.run("none", backend)
    heads, batch = torch.tensor([2, 0, 1]), torch.randperm(rows.shape[0])
    permuted = Case(
        tuple(None if x is None else x[batch][:, :, heads] for x in case.tensors),
        {"attention_mask": case.kwargs["attention_mask"][batch]},
    )
    permuted_rows, (permuted_grad,) = permuted.run("none", backend)
    torch.testing.assert_close(permuted_rows, rows[batch][:, heads])
    torch.testing.assert_close(permuted_grad, grad[batch][:, :, heads])


def test_strided_views(backend, device):
    """Heads of a fused projection, a sliced batch, reversed axes and broadcast tensors give the results of copies."""
    fused_t, fused_s = torch.randn(4, 30, 3 * 36, device=device), torch.randn(4, 30, 3 * 18, device=device)
    q_t, k_t, _ = fused_t[1:, 5:28].unflatten(-1, (3, 3, 12)).unbind(2)
    q_s, k_s, _ = fused_s[1:, 5:28].unflatten(-1, (3, 3, 6)).unbind(2)
    views = [
        (q_t, k_t, q_s, k_s),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q_t, k_t, q_s, k_s)),
        tuple(x[:1].expand(3, -1, -1, -1) for x in (q_t, k_t, q_s, k_s)),
    ]
    for view in views:
        assert not all(x.is_contiguous() for x in view)
        copies = Case(tuple(x.contiguous() for x in view), {})
        for reduction in ("sequence", "none"):
            value, grads = Case(view, {}).run(reduction, backend)
            expected, expected_grads = copies.run(reduction, backend)
            assert torch.equal(value, expected)
            assert all(torch.equal(g, e) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_nothing_to_compare(backend, device, reduction, cross):
    empty = [
        make(batch=0, cross=cross),
        make(length=0, cross=cross),
        make({"attention_mask": torch.zeros(2, 5)[:, :5].bool()}, batch=2, length=5, cross=cross),
        make({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, cross=cross),
        make({"cu_seqlens": torch.zeros(4, dtype=torch.int32), "causal": True}, cross=cross),
    ]
    for case in empty:
        for name in (backend, "reference"):
            value, grads = case.on(device).run(reduction, name)
            assert value.shape == (case.row_shape() if reduction == "none" else ())
            assert torch.equal(value, torch.zeros_like(value))
            assert all(torch.equal(g.cpu(), torch.zeros_like(x)) for g, x in zip(grads, case.tensors[2:], strict=False))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_packings(backend, device, kind, reduction):
    """Malformed cu_seqlens raise an error if the host can read them, and give NaN on backends that do not wait."""
    case = malformed(kind).on(device)
    if device == "cpu" or backend in ("torch", "reference"):
        with pytest.raises(ValueError, match="max_seqlen: " if "max_seqlen" in kind else "cu_seqlens: "):
            case.run(reduction, backend)
    else:
        assert all_nan(case, reduction, backend)


def test_equal_models_have_zero_divergence(backend, device):
    for mask in MASKS:
        x = make(mask, widths=(8, 8)).on(device)
        case = Case((x.tensors[0], None, x.tensors[0], None), x.kwargs)
        rows, (grad,) = case.run("none", backend)
        assert rows.max() <= 1e-6
        assert rows.min() >= 0
        assert grad.abs().max() <= 1e-5


def test_single_rows_near_their_teacher(backend, device):
    """A student close to its teacher has a row KL of about δ²/2, with δ the difference of two log-softmaxes.

    Here δ is about 1e-3 and the KL about 1e-6. A few rounding errors in δ change the KL by less than 1 %, but
    Σ (q − p) − Σ p·δ has the rounding error of a sum near 1.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 40, 3, 16, generator=generator)
    student = teacher + 1e-3 * torch.randn(teacher.shape, generator=generator)
    rows = relation_kl(teacher.to(device), None, student.to(device), None, reduction="none", backend=backend)
    expected = relation_kl(teacher.double(), None, student.double(), None, reduction="none", backend="reference")
    assert expected.median() < 1e-5
    torch.testing.assert_close(rows.cpu().double(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("target", [1e-1, 1e-3, 1e-4, 1e-5])
def test_small_divergences(backend, device, target):
    """float32, 12,288 rows: errors are below 1e-3 for losses of 1e-5 and more and rows of 1e-4 and more; no row < 0."""
    x = make(batch=16, length=32, heads=24, widths=(8, 8)).tensors[0]
    noise = torch.randn_like(x)

    def rows_at(amplitude: float) -> tuple[Case, torch.Tensor]:
        case = Case((x, None, x + amplitude * noise, None), {})
        return case, relation_kl(*case.to(torch.float64).tensors, reduction="none", backend="reference")

    amplitude = target**0.5
    for _ in range(3):  # KL is quadratic in the perturbation: a few iterations reach the target
        amplitude *= (target / rows_at(amplitude)[1].mean().item()) ** 0.5
    case, rows = rows_at(amplitude)
    assert 0.5 * target < rows.mean() < 2 * target
    case = case.on(device)
    value, (grad,) = case.run("token", backend)
    assert value >= 0
    assert abs(value.item() / rows.mean().item() - 1) < 1e-3
    evaluated = relation_kl(*case.tensors, reduction="token", backend=backend)  # without gradient: the exact form
    assert abs(evaluated.item() / rows.mean().item() - 1) < 1e-3
    got = case.run("none", backend)[0].cpu()
    assert got.min() >= 0
    judged = rows > 0.5e-4
    if target >= 1e-4:
        assert judged.float().mean() > 0.2
        assert ((got - rows).abs() / rows)[judged].max() < 1e-3
    assert error(grad, case.oracle("token")[1][0]) < 2e-3


def _large_feature(x):
    """All tokens share one feature ten times as large as the others, as after the layer norms of trained models."""
    return torch.cat([x[..., :-1], 10 + 0.1 * x[..., -1:]], -1)


def _large_mean(x):
    return 3 + 0.3 * x


def _uneven_tokens(x):
    """Token norms follow a log-normal distribution: rows dominated by one key next to rows of many keys."""
    return x * torch.exp(0.7 * torch.randn(*x.shape[:-1], 1, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("widths", [(16, 8), (64, 32)], ids=str)
@pytest.mark.parametrize("change", [_large_feature, _large_mean, _uneven_tokens])
def test_tokens_as_models_make_them(backend, device, change, widths):
    case = make(batch=1, length=150, heads=3, widths=widths)
    case = replace(case, tensors=tuple(None if x is None else change(x) for x in case.tensors)).on(device)
    expected, (expected_grad,) = case.oracle("sequence")
    rows, (dense_grad,) = dense(case, torch.full(case.row_shape(), 1 / 450, device=device))
    value, (grad,) = case.run("sequence", backend)
    assert error(value, expected) <= 2 * error(rows.double().mean(), expected) + torch.finfo(torch.float32).eps
    assert error(grad, expected_grad) <= 2 * error(dense_grad, expected_grad) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("spread", [4.0, 12.0, 40.0])
def test_sharp_relations(backend, device, spread):
    """Scores of tens to thousands give one-hot rows and distant row maxima; nothing overflows or underflows to 0."""
    case = make("holes", spread=spread, cross=False).on(device)
    value, (grad,) = case.run("sequence", backend)
    expected, (expected_grad,) = case.oracle("sequence")
    # A score has a rounding error of eps·|score|, and so does log p. Relative to a KL of that size, it is a few eps.
    assert error(value, expected) < 1e-5
    assert error(grad, expected_grad) < 1e-6 * spread**2 + 1e-5
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_repeated_runs_are_bitwise_equal(backend, device, reduction):
    case = make("prefix-holes", cross=True).on(device)
    value, grads = case.run(reduction, backend)
    for _ in range(3):
        again, again_grads = case.run(reduction, backend)
        assert torch.equal(again, value)
        assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))


def test_scales(backend, device):
    base = make("right", cross=True).on(device)
    case = Case(base.tensors, base.kwargs | {"teacher_scale": 0.9, "student_scale": -0.2})
    value, grads = case.run("token", backend)
    expected, expected_grads = case.oracle("token")
    assert error(value, expected) < 1e-6
    assert all(error(g, e) < 1e-5 for g, e in zip(grads, expected_grads, strict=True))
    zero = Case(base.tensors, base.kwargs | {"student_scale": 0.0})
    assert not any(g.any() for g in zero.run("token", backend)[1])
