"""Properties that hold for random shapes, masks and values."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .cases import Case, error, make

anything = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _groups(heads: int) -> list[tuple[int, int]]:
    return [(1, 1), (heads, heads), (1, heads)]


@st.composite
def cases(draw) -> Case:
    cross = draw(st.booleans())
    heads = draw(st.integers(1, 3))
    sizes = {"heads": heads, "widths": (draw(st.integers(1, 20)), draw(st.integers(1, 20)))}
    sizes |= {"rows": draw(st.sampled_from([None, 0.0, 0.5, 0.9])), "groups": draw(st.sampled_from(_groups(heads)))}
    spread, seed = draw(st.sampled_from([0.1, 1.0, 3.0])), draw(st.integers(0, 1000))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 40), max_size=5))
        kwargs = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int()}
        sequences, longest = len(lengths), max(lengths, default=0)
    else:
        sequences, longest = draw(st.integers(1, 3)), draw(st.integers(1, 40))
        sizes |= {"batch": sequences, "length": longest}
        kwargs = {}
        if draw(st.booleans()):
            real = draw(st.lists(st.booleans(), min_size=sequences * longest, max_size=sequences * longest))
            kwargs["attention_mask"] = torch.tensor(real).view(sequences, longest)
    order = draw(st.sampled_from(["bidirectional", "causal", "prefix"]))
    if order == "causal":
        kwargs["causal"] = True
    if order == "prefix":
        prefixes = draw(st.lists(st.integers(-3, longest + 3), min_size=sequences, max_size=sequences))
        kwargs["prefix_lens"] = torch.tensor(prefixes, dtype=torch.int64)
    return make(kwargs, cross=cross, spread=spread, seed=seed, **sizes)


@anything
@given(cases(), st.sampled_from(["sequence", "token", "sum", "none"]))
def test_the_reference_is_met(backend, case, reduction):
    """A score of size s has an error of a few eps·s; so do log-probabilities, rows and score gradients.

    A row's KL is a sum of terms of size 1 that cancel. Its error is a few eps·max(1, s), however small the KL is.
    """
    value, grads = case.run(reduction, backend)
    expected, expected_grads = case.oracle(reduction)
    students = [x for x in case.tensors[2:] if x is not None]
    largest_score = max(
        (x.square().sum(-1).max().item() for x in case.tensors if x is not None and x.numel()), default=0
    )
    few = 16 * torch.finfo(torch.float32).eps * max(1.0, largest_score)
    rows = students[0].shape[:-1].numel()
    terms = {"none": rows**0.5, "sum": rows}.get(reduction, 1)
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert (value - expected).norm() <= few * (expected.norm().item() + terms)
    for grad, wanted, x in zip(grads, expected_grads, students, strict=True):
        assert (grad - wanted).norm() <= few * (wanted.norm().item() + x.norm().item())


@anything
@given(cases())
def test_a_model_agrees_with_itself(backend, case):
    q_t, k_t, *_ = case.tensors
    rows, _ = Case((q_t, k_t, q_t.clone(), None if k_t is None else k_t.clone()), case.kwargs).run("none", backend)
    assert (rows >= 0).all()
    assert (rows < 1e-6).all()


@anything
@given(cases(), st.randoms(use_true_random=False))
def test_order_of_heads_does_not_matter(backend, case, random):
    heads = list(range(case.tensors[0].shape[-2]))
    random.shuffle(heads)
    rows, _ = case.run("none", backend)
    shuffled = Case(tuple(x if x is None or x.shape[-2] == 1 else x[..., heads, :] for x in case.tensors), case.kwargs)
    assert error(shuffled.run("none", backend)[0], rows[..., heads, :]) < 1e-6


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_rounding_errors_near_zero_average_out(backend, cross):
    """The loss of 25,600 rows that are almost equal to their teacher's: errors of both signs are summed.

    In float32 a row's KL has an error of about 3e-8 of random sign, which is 2e-10 in the mean. The sum of the positive
    errors alone would be 1e-9 and more if the errors of sequences were clamped to 0, and 6e-9 for those of rows.
    """
    x = torch.randn(200, 64, 2, 16, generator=torch.Generator().manual_seed(0))
    y = x + 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    case = Case((x, x.flip(1) if cross else None, y, y.flip(1) if cross else None), {})
    assert case.run("token", backend)[0] < 1e-9
