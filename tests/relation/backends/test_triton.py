"""The Triton backend without a GPU: contract tests in the interpreter, compilation for GPUs, tile maps."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minilm_kernels.relation.inputs import RelationInputs
from minilm_kernels.relation.masks import Mask
from tests.ptx.fences import unfenced
from tests.ptx.parser import parse

triton = pytest.importorskip("triton", reason="Triton is not built for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402

from benchmarks.static_cost import sass  # noqa: E402
from benchmarks.static_cost.cost import inner_loops  # noqa: E402
from benchmarks.static_cost.loops import analyse  # noqa: E402
from benchmarks.static_cost.triton_loops import variants, variants_of  # noqa: E402
from benchmarks.static_cost.variants import compile_triton, triton_source  # noqa: E402
from minilm_kernels.relation.backends.triton import gradient, row_kl, row_stats, scale, sequences, unordered  # noqa: E402
from minilm_kernels.relation.backends.triton import launch as triton_backend  # noqa: E402
from minilm_kernels.relation.backends.triton.config import float32_precision  # noqa: E402

ROOT = Path(__file__).parents[3]

# Tests that run in the interpreter, each shard in a subprocess. A call takes half a second, so that only one of several
# cases that are equal for the kernels runs. The interpreter multiplies bfloat16 matrices incorrectly, so bfloat16
# kernels are only compiled below. They run in the PTX emulator and on a GPU.
_CONTRACT = "tests/relation/test_contract.py"
_MASKS = "test_masks or test_padding"
_LEFT_OUT = """not (bfloat16 or test_teacher_and_student_dtypes)
    and not ((test_masks or test_padding or test_many_short or test_repeated) and (sum or token))
    and not (float16 and (6 or 17 or 32))
    and not (test_small_divergences and (0.1 or 0.001))
    and not (test_defaults and (float16 or -none or packed)) and not test_any_dtype""".replace("\n", " ")
# Query masks and grouped keys: those cases whose launches differ.
_ROWS = "test_rows or test_grouped or test_a_query or test_no_row or test_queries or test_several_relations"
_ROWS_CHOSEN = """test_rows_that and (holes or packed) and (sequence or none) or test_grouped and none
    or test_rows_and_groups_of and (65 or 257) and 0.95 or test_rows_and_groups_in and not bfloat16 and 16 and 8
    or (test_a_query or test_no_row or test_queries) and holes and (sequence or none)
    or test_several_relations""".replace("\n", " ")
SHARDS = {  # arguments of pytest, and the smallest number of tests
    "sample": ([_CONTRACT, "-k", "test_masks and (holes-self or packed-prefix-cross) and (sequence or none)"], 8),
    "masks": ([_CONTRACT, "-k", f"({_MASKS}) and {_LEFT_OUT}"], 60),
    "contract": ([_CONTRACT, "-k", f"not ({_MASKS} or {_ROWS}) and {_LEFT_OUT}"], 46),
    "rows": ([_CONTRACT, "-k", _ROWS_CHOSEN], 40),
    "kernels": (["tests/relation/backends/test_triton_kernels.py"], 5),
    "operator": (["tests/relation/test_ops.py", "-k", "opcheck and (none or holes) or inductor or upstream"], 5),
}
SECONDS = 1800  # limit of one shard, on a busy machine


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize(
    "shard",
    [
        "sample",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("masks", "kernels", "operator")),
        # tests/ptx runs such calls, too
        *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.nightly]) for name in ("contract", "rows")),
    ],
)
def test_in_the_interpreter(shard):
    selection, least = SHARDS[shard]
    environment = os.environ | {"TRITON_INTERPRET": "1", "MINILM_KERNELS_TEST_BACKENDS": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", *selection]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS - 60)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= least


def _usage(compiled) -> dict[str, int]:
    """Returns the resources of a compiled kernel, as ptxas reports them: registers, stack, local and shared memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        listing = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True, timeout=600
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", listing)}


def _spills_in_loops(compiled) -> int:
    """Returns the number of loads and stores of spilled registers in the loops over pairs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        functions, _ = sass.disassemble(Path(cubin.name))
    flow = analyse(functions[compiled.metadata.name])
    code = [instruction for loop in inner_loops(flow) for instruction in flow.code(loop.blocks)]
    return sum(instruction.base in ("LDL", "STL") for instruction in code)


@pytest.mark.parametrize(
    ("arch", "dtype", "every"),
    [
        (90, "bfloat16", 12),
        (90, "float32", 12),
        *(
            pytest.param(arch, dtype, 1, marks=[pytest.mark.slow, pytest.mark.nightly][: 2 if arch == 100 else 1])
            for arch in (80, 90, 100)
            for dtype in ("bfloat16", "float32")
        ),
    ],
)
def test_variants_compile_without_spills(arch, dtype, every):
    """Kernels use 0 bytes of stack: no register is spilled, and no array is indexed at run time.

    The kernels of unordered pairs, and those in float32, may spill between their loops.
    """
    chosen = [variant for variant in variants(arch) if variant.dtype == dtype]
    assert len(chosen) > 20
    for variant in chosen[::every]:
        compiled = compile_triton(variant, arch)
        usage = _usage(compiled)
        label = (variant.kernel, variant.group, variant.d_t, variant.d_s, usage)
        if "unordered" in variant.group or dtype == "float32":
            assert _spills_in_loops(compiled) == 0, label
        else:
            assert usage["STACK"] == usage["LOCAL"] == 0, label
        if arch == 90:
            assert unfenced(parse(compiled.asm["ptx"])[compiled.metadata.name]) == [], label
        assert compiled.metadata.shared <= 99 * 1024, label  # limit of a block on the smallest of these architectures


def test_wgmma_sees_what_was_copied():
    """row_stats loads its tiles by cp.async if the compiler fences the copies; otherwise it uses ordinary stores."""
    variant = next(v for v in variants_of("bfloat16", 16, 8, "self") if v.kernel == "row_stats")
    compiled = compile_triton(variant, 90)
    ptx = compiled.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert ("cp.async" in ptx) == (variant.options["num_stages"] > 1)
    assert unfenced(parse(ptx)[compiled.metadata.name]) == []


@pytest.mark.parametrize(
    ("width", "capability", "precision"),
    [
        (16, (8, 0), "bf16x6"),
        (64, (9, 0), "bf16x6"),
        (64, (10, 3), "bf16x6"),
        (128, (9, 0), "ieee"),
        (16, (7, 5), "ieee"),  # without bfloat16
        (16, (8, 9), "ieee"),
        (16, (12, 0), "ieee"),
        (16, None, "ieee"),
    ],
)
def test_float32_uses_fast_tensor_cores(width, capability, precision):
    assert float32_precision(width, capability) == precision


class _Gpu:
    """Stands in for Triton's driver: an sm_90 device on which nothing is launched."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


@pytest.fixture
def compilations(monkeypatch):
    """Collects what Triton would compile for launches with CPU tensors, by its cache key. Nothing is compiled."""
    found = {}
    monkeypatch.setattr(triton.runtime.driver, "_active", _Gpu())
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)

    def add(*, key, fn, compile, **_):
        found[key] = (fn.name, compile)
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = add
        yield found
    for module in (gradient, row_kl, row_stats, scale, sequences, unordered):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()


def _launch_everything(heads: int, token_shape, widths=(16, 8), relations=((0, 0), (1, 1), (2, 2)), **mask) -> None:
    """Launches the kernels of a loss with gradient, of an evaluation and of single rows, all in bfloat16.

    Tensors are slices of a fused projection.
    """
    teacher, student = (torch.zeros(*token_shape, 3, heads, width, dtype=torch.bfloat16).unbind(-3) for width in widths)
    inputs = RelationInputs(teacher, student, relations, Mask(token_shape, torch.device("cpu"), **mask))
    for with_gradient in (False, True):
        triton_backend.forward_reduced(inputs, "sequence", with_gradient)
    rows = triton_backend.forward_none(inputs)
    triton_backend.backward_none(inputs, rows)


_BOUNDS = torch.tensor([0, 0, 7, 20, 31], dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "relations"),
    [("none", "self"), ("none", "cross"), ("holes", "cross"), ("packed", "self"), ("query mask", "cross")],
)
def test_other_shapes_compile_nothing(compilations, kind, relations):
    """Sizes and strides that are 1, odd or multiples of 16, and bounds at any address, reuse the compiled kernels.

    Otherwise a new batch size or length would cost seconds and, while a CUDA graph is captured, fail.
    """
    pairs = {"self": ((0, 0), (1, 1), (2, 2)), "cross": ((0, 1), (1, 2), (2, 0))}[relations]
    counts = []
    for batch, length, heads in ((2, 32, 16), (1, 31, 1), (3, 1, 5), (1, 16, 2)):
        token_shape, mask = (batch, length), {}
        if kind == "holes":
            mask = {"attention_mask": torch.arange(length).expand(token_shape) % 3 > 0}
            mask["prefix_lens"] = torch.arange(1, 2 + batch)[1:]  # not aligned
        elif kind == "query mask":
            mask = {"query_mask": torch.ones(token_shape)}
        elif kind == "packed":
            bounds = _BOUNDS[len(_BOUNDS) - 1 - batch :]
            token_shape, mask = (31,), {"cu_seqlens": bounds, "causal": True}
        _launch_everything(heads, token_shape, relations=pairs, **mask)
        counts.append(len(compilations))
    assert counts[0] > 4
    assert len(set(counts)) == 1, counts


@pytest.mark.parametrize(
    ("group", "mask"),
    [
        ("self", {}),
        ("cross", {}),
        ("self rows", {}),
        ("self packed causal", {"cu_seqlens": _BOUNDS, "causal": True}),
        ("self unordered", {}),
        ("self unordered split", {}),
        ("self unordered 2048", {}),
        ("self unordered packed causal", {"cu_seqlens": _BOUNDS, "causal": True}),
        (
            "cross padded prefix rows",
            {"attention_mask": torch.arange(262).view(2, 131) % 3, "prefix_lens": torch.tensor([3, 9])},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_static_cost_is_that_of_what_runs(compilations, group, mask, monkeypatch):
    """Every kernel that `python -m benchmarks static` compiles is one that a call launches."""
    monkeypatch.setattr(triton_backend, "_gpu", lambda _device: (99 if "split" in group else 0, 90))
    relations = [(0, 0), (1, 1), (2, 2)] if "self" in group else [(0, 1), (1, 2), (2, 0)]
    widths = (64, 32) if group in ("self", "self packed causal") else (16, 8)
    token_shape = (31,) if "packed" in group else (2, 2100 if "2048" in group else 131)
    _launch_everything(4, token_shape, widths, relations, **mask)
    launched = []
    for name, compiled in compilations.values():
        attributes = {place: value for place, value in compiled["configs"][0].items() if value}
        given = json.loads(compiled["specialization_data"])["options"]
        options = {option: given[option] for option in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")}
        launched.append((name, compiled["signature"], compiled["constants"], attributes, options))
    for variant in variants_of("bfloat16", *widths, group, per_head_kernels="self" in group):
        source = triton_source(variant)
        constants = {place: getattr(value, "value", value) for place, value in source.constants.items()}
        options = {"num_warps": 4, "num_stages": 3, "maxnreg": None} | variant.options
        declared = (source.fn.fn.__qualname__, source.signature, constants, source.attrs, options)
        assert declared in launched, [one for one in launched if one[0] == declared[0]]


@pytest.mark.parametrize("block", [16, 64, 128])
def test_tile_map(block):
    """The grid has every tile of every sequence once. The remaining tiles belong to no sequence."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 60):
        lengths = torch.randint(0, 3 * block, (count,), generator=generator)
        lengths[torch.rand(count, generator=generator) < 0.4] = 0
        cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        sequences = triton_backend.tile_map(cu_seqlens, int(lengths.sum()), block)
        tiles = torch.arange(sequences.numel()) - (cu_seqlens[sequences] // block + sequences)
        inside = tiles * block < lengths[sequences]
        assert (tiles >= 0).all()
        got = list(zip(sequences[inside].tolist(), tiles[inside].tolist(), strict=True))
        assert got == [(n, t) for n in range(count) for t in range(-(-int(lengths[n]) // block))]


@pytest.mark.parametrize("values", [[0, 5, 3, 12], [-7, 40, 2, 99], [2**31 - 1, -(2**31), 0, 1], [12, 8, 4, 0]])
def test_tile_map_of_malformed_sequences_stays_inside(values):
    sequences = triton_backend.tile_map(torch.tensor(values, dtype=torch.int32), 12, 16)
    assert sequences.numel() == 3
    assert sequences.min() >= 0
    assert sequences.max() <= 2


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"attention_mask": lambda: torch.ones(4, 50, dtype=torch.bool)},
        {"attention_mask": lambda: torch.ones(4, 50), "prefix_lens": lambda: torch.ones(4, dtype=torch.int32)},
        {"attention_mask": lambda: torch.ones(4, 50), "query_mask": lambda: torch.ones(4, 50)},
        {"causal": True},
        {"cu_seqlens": lambda: torch.zeros(5, dtype=torch.int32), "prefix_lens": lambda: torch.ones(4)},
        {"cu_seqlens": lambda: torch.zeros(5, dtype=torch.int32), "query_mask": lambda: torch.ones(200)},
    ],
    ids=lambda mask: "-".join(mask) or "none",
)
def test_the_host_never_waits(mask, monkeypatch):
    """The host reads no values: fake tensors have none, and reading one raises an error."""
    launches = []
    monkeypatch.setattr(triton_backend, "_start", lambda _device, kernel, *_: launches.append(kernel.__name__))
    with FakeTensorMode():
        mask = {name: value() if callable(value) else value for name, value in mask.items()}
        token_shape = (200,) if "cu_seqlens" in mask else (4, 50)
        teacher, student = ([torch.empty(*token_shape, 3, width) for _ in range(3)] for width in (16, 8))
        relations = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 0)]
        problem = RelationInputs(teacher, student, relations, Mask(token_shape, torch.device("cpu"), **mask))
        for gradient in (False, True):
            values, grads = triton_backend.forward_reduced(problem, "sequence", gradient)
            assert values.shape == (5,)
            assert len(grads) == (7 if gradient else 0)
        rows = triton_backend.forward_none(problem)
        triton_backend.backward_none(problem, rows)
        with pytest.raises(Exception, match=r"_local_scalar_dense|[Dd]ata.?[Dd]ependent"):
            values[0].item()
    # Three self relations share their launches, and so do two cross relations, which have two gradients each.
    assert launches.count("row_stats_kernel") == 2 * 4
    assert launches.count("gradient_kernel") == 3 * 2
    assert launches.count("row_kl_kernel") == 2 * 2


@pytest.mark.parametrize("few", [False, True])
def test_launches_of_a_loss(monkeypatch, few):
    """Forward and gradient of a loss of three narrow self relations are two launches; few heads take two more."""
    launches = []
    monkeypatch.setattr(triton_backend, "_gpu", lambda _device: (99 if few else 0, 90))
    monkeypatch.setattr(triton_backend, "_start", lambda _device, kernel, *_: launches.append(kernel.__name__))
    teacher, student = ([torch.zeros(2, 131, 4, width, dtype=torch.float16)] * 3 for width in (16, 8))
    inputs = RelationInputs(teacher, student, [(0, 0), (1, 1), (2, 2)], Mask((2, 131), torch.device("cpu")))
    triton_backend.forward_reduced(inputs, "sequence", True)
    assert launches == ["unordered_kernel"] * (3 if few else 1) + ["total_kernel"]


def test_auto_leaves_cpu_tensors_to_the_others():
    assert triton_backend.interpreted() or triton_backend.unsupported_reasons(
        RelationInputs(
            [torch.zeros(1, 1, 1, 1)], [torch.zeros(1, 1, 1, 1)], [(0, 0)], Mask((1, 1), torch.device("cpu"))
        )
    )


def test_widths_and_dtypes_beyond_it_are_refused():
    wide = torch.zeros(1, 2, 1, 129, dtype=torch.float64)
    reasons = triton_backend.unsupported_reasons(
        RelationInputs([wide], [wide], [(0, 0)], Mask((1, 2), torch.device("cpu")))
    )
    assert any("129" in reason for reason in reasons)
    assert any("float64" in reason for reason in reasons)
