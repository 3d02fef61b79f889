"""Tests of the CPU kernels: every instruction set, both paths, threads, memory and refused calls."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch

from minilm_kernels import backend_status, relation_kl
from minilm_kernels._choices import REDUCTIONS
from minilm_kernels.relation.api import relation_kl_multi
from minilm_kernels.relation.backends import native
from tests.relation.cases import MASKS, Case, check_beside_dense, dense, error, make

pytestmark = pytest.mark.skipif(backend_status()["cpu"] != "ready", reason=str(backend_status()["cpu"]))
INSTRUCTION_SETS = native.cpu.instruction_sets() if backend_status()["cpu"] == "ready" else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch) -> str:
    monkeypatch.setenv("MINILM_KERNELS_CPU", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads and restores it after the test."""
    found = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(found)


def _check(case: Case, reduction: str = "sequence") -> None:
    """The limit is twice the error of dense PyTorch on an unmasked batch of this distribution, plus one rounding."""
    cross, widths = case.tensors[1] is not None, (case.tensors[0].shape[-1], case.tensors[2].shape[-1])
    spread = case.tensors[0].float().nan_to_num(0, 0, 0).std().item()
    full = make(cross=cross, widths=widths, length=min(257, max(23, case.tensors[0].shape[-3])), spread=spread, seed=7)
    rows, grads = dense(full)
    expected_rows, expected_grads = full.oracle("none")
    allowed = 2 * error(rows, expected_rows) + 1.2e-7
    allowed_grad = 2 * max(error(g, e) for g, e in zip(grads, expected_grads, strict=True)) + 1.2e-7
    value, grads = case.run(reduction, "cpu")
    expected, expected_grads = case.oracle(reduction)
    assert error(value, expected) <= allowed
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) <= allowed_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(instruction_set, mask, reduction):
    for rows in (None, 0.6):
        _check(make(mask, rows=rows), reduction)
        _check(make(mask, cross=True, rows=rows), reduction)
    _check(make(mask, cross=True, heads=4, rows=0.6, groups=(2, 4)), reduction)


_LONG = {  # for the symmetric path: lengths and prefixes that end inside and between row blocks and key blocks
    "none": {},
    "causal": {"causal": True},
    "prefix": {"prefix_lens": torch.tensor([77, 130, 8])},
    "holes": {"attention_mask": torch.rand(3, 131, generator=torch.Generator().manual_seed(1)) < 0.8},
}


@pytest.mark.parametrize("mask", _LONG)
@pytest.mark.parametrize("widths", [(1, 1), (6, 31), (8, 16), (12, 6), (64, 32), (31, 128)], ids=str)
def test_widths(instruction_set, widths, mask):
    for cross in (False, True):
        _check(make(_LONG[mask], batch=3, length=131, heads=2, widths=widths, cross=cross))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9], ids=["row-wise", "either", "symmetric"])
@pytest.mark.parametrize("mask", _LONG)
def test_rows_of_long_sequences(instruction_set, mask, share):
    for cross in (False, True):
        _check(make(_LONG[mask], batch=3, length=131, heads=4, cross=cross, rows=share, groups=(4, 2)))


@pytest.mark.parametrize("length", [63, 64, 65, 71, 72, 80, 95, 96, 97, 127, 128, 129, 255, 256, 257, 300])
def test_lengths(instruction_set, length):
    _check(make({"prefix_lens": torch.tensor([length // 2])}, batch=1, length=length, heads=2, widths=(16, 8)))
    _check(make(batch=1, length=length, heads=2, widths=(16, 8)))


def test_all_relations_in_one_call(instruction_set):
    """Self relations and cross relations of different widths in one call."""
    draw = torch.Generator().manual_seed(2)
    teacher = {name: torch.randn(2, 70, 3, width, generator=draw) for name, width in (("q", 8), ("k", 8), ("v", 12))}
    student = {name: torch.randn(2, 70, 3, width, generator=draw) for name, width in (("q", 4), ("k", 4), ("v", 6))}
    leaves = {name: x.requires_grad_() for name, x in student.items()}
    pairs = [("q", "k"), ("v", "v"), ("q", "q")]
    together = relation_kl_multi(teacher, leaves, pairs, backend="cpu")
    expected = relation_kl_multi(
        {n: x.double() for n, x in teacher.items()},
        {n: x.double() for n, x in leaves.items()},
        pairs,
        backend="reference",
    )
    torch.testing.assert_close(together.double(), expected, rtol=1e-6, atol=0)
    weights = torch.tensor([1.0, 2.0, 3.0])
    grads = torch.autograd.grad(together @ weights, list(leaves.values()))
    expected_grads = torch.autograd.grad(expected @ weights.double(), list(leaves.values()))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert error(grad, expected_grad) < 2e-6


@pytest.mark.parametrize("spread", [0.05, 2.5, 3.5, 5.0, 8.0, 30.0])
def test_any_range_of_norms(instruction_set, spread):
    """Ranges of s_ii from 0 to tens of thousands, on both sides of the limit for one reference score."""
    case = make(batch=2, length=90, heads=2, widths=(8, 8), spread=spread)
    norms = case.tensors[0].square().sum(-1) * 8**-0.5
    ranges = (norms.amax(1) - norms.amin(1)).flatten()
    assert (ranges.max() < 83) == (spread < 3)  # on both sides of the limit
    _check(case)


@pytest.mark.parametrize("widths", [(16, 8), (64, 32)], ids=str)
@pytest.mark.parametrize("kind", ["rows", "wide range", "negative scales", "cross"])
def test_common_component(instruction_set, kind, widths):
    """All tokens share a feature that is 100 times as large as the others."""
    case = make(batch=1, length=150, widths=widths, cross=kind == "cross")
    tensors = tuple(x if x is None else torch.cat([x[..., :-1], 100 + x[..., -1:]], -1) for x in case.tensors)
    scales = {"teacher_scale": -0.25, "student_scale": -0.35} if kind == "negative scales" else {}
    check_beside_dense(Case(tensors, scales), "none" if kind == "rows" else "sum", "cpu")


def test_equal_norms_beyond_the_range_of_exp(instruction_set):
    """Tokens v and −v with a large norm: the range of norms is 0, but 0 is no suitable reference score."""
    signs = torch.where(torch.rand(2, 90, 2, 1, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    for length in (30, 90):
        x, y = (signs[:, :length] * size * torch.ones(width) for size, width in ((9.0, 8), (11.0, 6)))
        case = Case((x, None, y, None), {})
        norms = torch.cat((x.square().sum(-1) * 8**-0.5, y.square().sum(-1) * 6**-0.5))
        assert norms.min() > 89  # e^89 overflows float32
        for reduction in ("sum", "none"):
            value, (grad,) = case.run(reduction, "cpu")
            expected, (expected_grad,) = case.oracle(reduction)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_rows_that_see_almost_only_themselves(instruction_set):
    """In one-hot rows, q_ii − p_ii must be computed from the other probabilities, because q_ii and p_ii round to 1."""
    length, size, generator = 96, 4.0 * 32**0.25, torch.Generator().manual_seed(0)

    def of_one_size(x):
        return size * torch.nn.functional.normalize(x, dim=-1)

    teacher = of_one_size(torch.randn(2, length, 2, 32, generator=generator))
    student = of_one_size(teacher + 0.02 * torch.randn(teacher.shape, generator=generator))
    case = Case((teacher, None, student, None), {})
    _, (expected,) = case.oracle("sequence")
    _, (dense_grad,) = dense(case, torch.full(case.row_shape(), 1 / (4 * length)))
    _, (grad,) = case.run("sequence", "cpu")
    assert error(dense_grad, expected) > 4e-3
    # The other exponentials of teacher and student differ by about 1e-3 and have errors of 1e-7.
    assert error(grad, expected) < 4e-4


@pytest.mark.parametrize("scales", [(-0.3, 0.4), (0.3, -0.4), (-0.2, -0.2), (0.0, 0.3), (0.3, 0.0)])
def test_scales_of_any_sign(instruction_set, scales):
    for cross in (False, True):
        case = make({"teacher_scale": scales[0], "student_scale": scales[1]}, batch=1, length=80, cross=cross)
        value, grads = case.run("sequence", "cpu")
        expected, expected_grads = case.oracle("sequence")
        assert error(value, expected) < 1e-6
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert error(grad, expected_grad) < 2e-6


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_nan_in_a_valid_token_propagates(instruction_set, cross):
    for length in (20, 100):
        for payload in (float("nan"), float("inf")):
            case = make(batch=2, length=length, heads=1, cross=cross)
            case.tensors[2].data[0, length // 2, 0, 3] = payload
            value, grads = case.run("sum", "cpu")
            assert value.isnan()
            for grad in grads:
                assert grad[0].isnan().any()
                assert grad[1].isfinite().all()


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kwargs"),
    [
        (3, 40, 6, {}),
        (2, 150, 12, {"attention_mask": torch.rand(2, 150, generator=torch.Generator().manual_seed(4)) < 0.5}),
        (1, 1037, 1, {}),  # few tasks: the slices of one task run in parallel
        (1, 1037, 2, {"causal": True}),
        (1, 8200, 1, {"prefix_lens": torch.tensor([5000])}),
    ],
)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_bits_do_not_depend_on_threads(instruction_set, threads, batch, length, heads, kwargs, cross):
    if length > 8000 and instruction_set == "portable":
        length, kwargs = 1999, {"prefix_lens": torch.tensor([1500])}
    plain = make(kwargs, batch=batch, length=length, heads=heads, widths=(6, 4), cross=cross)
    half = heads // 2 or 1
    grouped = make(
        kwargs, batch=batch, length=length, heads=heads, widths=(6, 4), cross=cross, rows=0.7, groups=(half, half)
    )
    for case, reduction in ((plain, "sequence"), (plain, "none"), (grouped, "sequence")):
        threads(1)
        value, grads = case.run(reduction, "cpu")
        for count in (2, 2, 3):
            threads(count)
            again, again_grads = case.run(reduction, "cpu")
            assert torch.equal(again, value)
            assert all(torch.equal(a, g) for a, g in zip(again_grads, grads, strict=True))


def test_slices_of_one_task(instruction_set):
    case = make({"causal": True}, batch=1, length=1037, heads=1, widths=(16, 8))
    _check(case)
    _check(make(batch=1, length=1037, heads=1, widths=(8, 4), cross=True))
    _check(make(batch=1, length=600, heads=2, widths=(8, 4), cross=True, rows=0.5, groups=(2, 2)))


def test_half_precision_is_read_exactly(instruction_set):
    """Every finite float16 and bfloat16 number, subnormal numbers included, in students of width 1 with two tokens."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = x[x.isfinite() & (x.abs() < 1e4)][: 65024 // 8 * 8]
        pairs = torch.stack((x, torch.ones_like(x)), 1)[:, :, None, None]  # (n, 2, 1, 1)
        teacher = torch.zeros_like(pairs)
        rows = relation_kl(teacher, None, pairs, None, reduction="none", backend="cpu", student_scale=1e-4)
        same = relation_kl(
            teacher.float(), None, pairs.float(), None, reduction="none", backend="cpu", student_scale=1e-4
        )
        assert torch.equal(rows, same)


@pytest.fixture
def poisoned():
    """Fills the memory of torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("length", [21, 700], ids=["by one thread", "by all threads"])
@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_all_of_a_gradient_is_written(poisoned, threads, length, reduction):
    """Gradients of padding are 0: before, between and after valid tokens, and in sequences without valid tokens."""
    threads(2)
    valid = torch.rand(4, length, generator=torch.Generator().manual_seed(3)) < 0.5
    valid[0, 0] = valid[1, -1] = True
    valid[2] = False
    x, y = (torch.randn(4, length, 3, width).requires_grad_(width == 12) for width in (16, 12))
    values = relation_kl_multi(
        {"q": x, "k": x + 1, "one": x[:, :, :1] + 2},
        {"q": y, "k": y.square(), "one": y[:, :, 1:2].exp()},
        [("q", "q"), ("q", "k"), ("q", "one")],
        attention_mask=valid,
        reduction=reduction,
        backend="cpu",
    )
    (grad,) = torch.autograd.grad(values.sum(), y)
    assert not grad[~valid].any()
    assert grad[valid].all()


def test_the_lock_of_python_is_released():
    """Other threads run while a kernel runs. The switch interval is endless, so the kernel must release the GIL.

    Kernels run until this thread has been scheduled during one of them.
    """
    x, y = torch.randn(1, 4096, 2, 16), torch.randn(1, 4096, 2, 8)
    entered, finished, scheduled = threading.Event(), [], []
    values, grad = torch.empty(1), torch.zeros_like(y)
    masks = (torch.arange(4096), torch.tensor([0, 4096]), None, None, False)
    arguments = (*masks, torch.ones(1), None, values, None, [grad])

    def work():
        entered.set()
        for _ in range(200):
            torch.ops.minilm_kernels_cpu.relation_kl(
                [x], [y], [0, 0], [0.25, 0.35], *arguments, native.cpu.instruction_sets()[0]
            )
            if scheduled:
                break
        finished.append(True)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        assert entered.wait(600)
        scheduled.append(True)
        running = not finished
        worker.join(600)
    finally:
        sys.setswitchinterval(interval)
    assert running
    assert finished


_PEAK = """
import torch
from minilm_kernels import relation_kl
torch.set_num_threads({threads})
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
def draw(*shape):
    return torch.randn(*shape)
relation_kl(draw(1, 70, 64, 8), None, draw(1, 70, 64, 8).requires_grad_(), None, backend="cpu").backward()
shape, cross = (1, {length}, {heads}), {cross}
q_t, k_t, q_s, k_s = (draw(*shape, width) for width in (32, 32, 16, 16))
student = [x.requires_grad_() for x in ((q_s, k_s) if cross else (q_s,))]
open("/proc/self/clear_refs", "w").write("5")
before, files = status("VmRSS"), status("RssFile")
value = relation_kl(q_t, k_t if cross else None, q_s, k_s if cross else None, backend="cpu")
print(status("VmHWM") - before - sum(x.numel() * 4 for x in student) / 2**20, status("RssFile") - files)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("length", "heads", "cross", "threads"),
    [(512, 24, False, 2), (2048, 16, False, 2), (16384, 1, True, 2), (4096, 48, False, 64)],
)
def test_peak_memory(length, heads, cross, threads):
    """A call allocates at most 32 MiB in addition to the gradient, for any S and any number of threads."""
    script = _PEAK.format(length=length, heads=heads, cross=cross, threads=threads)
    for _ in range(5):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600)
        rise, files = map(float, result.stdout.split())
        if files >= 0:  # otherwise the system has taken pages of files meanwhile, which hide a rise of the same size
            break
    assert 0 < rise <= 32


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("MINILM_KERNELS_CPU", "mmx")
    case = make()
    with pytest.raises(RuntimeError, match=r"MINILM_KERNELS_CPU is 'mmx', but this processor runs .*portable"):
        case.run("sum", "cpu")
    case.run("sum", "auto")


@pytest.fixture
def elsewhere(tmp_path):
    """A function that looks for the library in an otherwise empty package folder and returns the backend's reason."""
    package = tmp_path / "minilm_kernels"
    package.mkdir()

    def look() -> str | None:
        backend = native.CPUBackend()
        backend.library = package / "_cpu.abi3.so"
        return backend.unavailable_reason()

    return look


def test_an_installation_without_the_library_says_why(elsewhere, tmp_path, recwarn):
    assert elsewhere() == "the package was installed without its CPU library"
    about_it = [warning for warning in recwarn if "minilm_kernels" in str(warning.message)]
    assert not about_it  # the library was left out on request
    (tmp_path / "minilm_kernels/_cpu.missing").write_text("no C++ compiler was found", encoding="utf-8")
    with pytest.warns(UserWarning, match="slower backend `torch` serves.*no C\\+\\+ compiler"):
        assert "no C++ compiler was found" in elsewhere()
    (tmp_path / "minilm_kernels/_cpu.abi3.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="slower backend `torch` serves.*does not load"):
        assert "does not load" in elsewhere()


def test_a_source_tree_without_the_library_says_the_way_out(elsewhere, tmp_path):
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    with pytest.warns(UserWarning, match="slower backend `torch` serves; this is the source tree"):
        reason = elsewhere()
    assert f"source tree {tmp_path}," in reason
    assert "`pip install -e .`" in reason
    assert "start Python in another folder" in reason


def test_two_threads_load_a_library_once():
    loads = []

    class Slow(native.NativeBackend):
        def _load(self):
            loads.append(threading.current_thread())
            other.start()
            other.join(0.5)  # which waits for this one, or loads the library as well

    backend = Slow("cpu")
    other = threading.Thread(target=backend.unavailable_reason)
    assert backend.unavailable_reason() is None
    other.join(600)
    assert loads == [threading.current_thread()]


def test_a_slow_fallback_is_said_once(monkeypatch, tmp_path):
    """There is one warning, for any number of calls and of earlier queries of backends."""
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    monkeypatch.setattr(native.cpu, "library", tmp_path / "minilm_kernels/_cpu.abi3.so")
    monkeypatch.setattr(native.cpu, "load_error", native.NOT_LOADED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            backend_status()
            relation_kl(torch.randn(1, 5, 2, 4), None, torch.randn(1, 5, 2, 4, requires_grad=True), None).backward()
    assert [str(w.message).count(str(tmp_path)) for w in caught if "minilm_kernels" in str(w.message)] == [1]
