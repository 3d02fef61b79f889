"""Compilation of the CUDA kernels: the kernels of a call, the cost of machine code for every GPU, cache, failures."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilm_kernels import __main__ as command
from minilm_kernels import backend_status
from minilm_kernels.relation.api import relation_kl_multi
from minilm_kernels.relation.backends import cuda_compiler, native
from minilm_kernels.relation.backends.cuda_cache import VARIABLE, KernelCache
from minilm_kernels.relation.backends.cuda_compiler import CompilerError, compile_kernels, kernel_names
from minilm_kernels.relation.backends.cuda_loader import KernelLoader
from minilm_kernels.relation.inputs import BackendUnavailable
from tests.relation.cases import Case, make

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is for Linux")
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TINY = "reduce"  # the kernel that compiles fastest


@pytest.fixture
def needed(new_gpu, monkeypatch):
    """`needed(call, *props)` returns the kernels that a call needs on a new GPU, without compiling them."""
    asked: set[str] = set()

    def compile_nothing(names, *_, **__):
        asked.update(names)
        return dict.fromkeys(names, b"no code\0")

    monkeypatch.setattr(cuda_compiler, "compile_kernels", compile_nothing)
    monkeypatch.setattr(native.cuda.loader, "limit", 10**6)

    def ask(call, *props) -> set[str]:
        new_gpu(*props)
        asked.clear()
        call()
        return set(asked)

    return ask


def _evaluate(case: Case) -> None:
    with torch.no_grad():
        relation_kl_multi({"q": case.tensors[0]}, {"q": case.tensors[2]}, [("q", "q")], backend="cuda", **case.kwargs)


@pytest.mark.parametrize("dtype_s", DTYPES)
@pytest.mark.parametrize("dtype_t", DTYPES)
@pytest.mark.parametrize(
    "widths", [(16, 8), (64, 32), (1, 1), (7, 9), (33, 17), (8, 128), (128, 64), (96, 12)], ids=str
)
def test_names_are_those_of_the_host_code(needed, widths, dtype_t, dtype_s):
    found = set()
    for mask in ("none", "causal"):
        for cross in (False, True):
            case = make(mask, widths=widths, cross=cross, batch=1, length=5, heads=1)
            dtypes = [DTYPES[dtype_t]] * 2 + [DTYPES[dtype_s]] * 2
            tensors = [x if x is None else x.to(dtype) for x, dtype in zip(case.tensors, dtypes, strict=True)]
            case = replace(case, tensors=tuple(tensors))
            for reduction in ("sequence", "none"):
                found |= needed(lambda case=case, reduction=reduction: case.run(reduction, "cuda"))
            if not cross:
                found |= needed(lambda case=case: _evaluate(case))
                longer = replace(
                    case, tensors=tuple(x if x is None else x[:, :1].expand(1, 9000, -1, -1) for x in tensors)
                )
                found |= needed(lambda longer=longer: longer.run("sequence", "cuda"))
    masked = replace(case, kwargs={"attention_mask": torch.ones(1, 5)})
    found |= needed(lambda: masked.run("sequence", "cuda"))
    named = set(kernel_names(*widths, dtype_t, dtype_s))
    without_strips = {name for name in named if name.startswith("segments")}  # the host does not launch them
    assert found | without_strips == named
    if widths in ((16, 8), (64, 32), (1, 1)) and dtype_t == dtype_s == "bfloat16":
        assert found == named


def _loss(relations: list[tuple[str, str]], kwargs: dict, dtype, reduction: str, gradient: bool, length: int = 512):
    def call() -> None:
        token_shape = (2 * length,) if "cu_seqlens" in kwargs else (2, length)
        teacher, student = ({x: torch.zeros(*token_shape, 2, w, dtype=dtype) for x in "qkv"} for w in (16, 8))
        if gradient:
            student = {x: tensor.requires_grad_() for x, tensor in student.items()}
        value = relation_kl_multi(teacher, student, relations, reduction=reduction, backend="cuda", **kwargs)
        if gradient:
            value.sum().backward()

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"attention_mask": torch.ones(2, 512, dtype=torch.bool)},
        {"causal": True},
        {"cu_seqlens": torch.tensor([0, 300, 1024], dtype=torch.int32)},
    ],
    ids=["full", "padded", "causal", "packed"],
)
@pytest.mark.parametrize("props", [(90, 232448, 233472), (80, 30000, 31000)], ids=["symmetric", "row-wise"])
def test_a_loss_of_one_shape_needs_few_kernels(needed, props, kwargs, dtype):
    for relations in ([("q", "q"), ("k", "k"), ("v", "v")], [("q", "k"), ("v", "v")]):
        for reduction in ("sequence", "none"):
            for gradient in (True, False):
                call = _loss(relations, kwargs, DTYPES[dtype], reduction, gradient)
                names = needed(call, *props)
                # Self and cross relations have different row-wise kernels in float32.
                assert 0 < len(names - set(cuda_compiler.SHARED)) <= (6 if dtype == "float32" else 4)


@pytest.fixture(scope="module")
def cache():
    """The cache of `make cuda`. The test of a kernel compiles it for others, and finds what did not change."""
    return KernelCache(Path(__file__).parents[3] / "build" / "cuda")


def _sass(name: str, architecture: int, code: bytes, folder: Path):
    from benchmarks.static_cost import sass

    cubin = folder / f"{name}-{architecture}.cubin"
    cubin.write_bytes(code)
    functions, resources = sass.disassemble(cubin)
    return functions[name], resources[name]


def _check_registers(name: str, architecture: int, code: bytes, folder: Path) -> None:
    """No loop over pairs accesses local memory. Kernels of strips may save some registers between these loops."""
    from benchmarks.static_cost import loops

    function, resources = _sass(name, architecture, code, folder)
    flow = loops.analyse(function)
    for body in (flow.code(loop.blocks) for loop in flow.loops if not loop.children):
        opcodes = {instruction.base for instruction in body}
        assert not ("HMMA" in opcodes and opcodes & {"LDL", "STL"}), name
    assert resources.local == 0, name
    limit = 96 if name.startswith("symmetric") else 192 if name.startswith("segments") else 32
    assert resources.stack <= limit, name


def test_one_kernel_for_one_gpu():
    code = compile_kernels([TINY], 80)
    assert list(code) == [TINY]
    assert code[TINY].startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "dtype", "architecture"), [
    *(((16, 8), dtype, arch) for dtype in ("bfloat16", "float16", "float32") for arch in ARCHITECTURES),
    *(pytest.param((64, 32), dtype, arch, marks=[pytest.mark.nightly] if arch in (90, 120) else [])
      for dtype in ("bfloat16", "float16") for arch in ARCHITECTURES),
])  # fmt: skip
def test_every_kernel_compiles_without_spills(widths, dtype, architecture, cache, tmp_path):
    pytest.importorskip("triton", reason="its wheel brings the disassembler")
    names = kernel_names(*widths, dtype, dtype)
    for name, code in compile_kernels(names, architecture, cache=cache).items():
        _check_registers(name, architecture, code, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, *(pytest.param(x, marks=pytest.mark.nightly) for x in (90, 100)), 120])
@pytest.mark.parametrize(("widths", "dtype"), [
    *((widths, dtype) for widths in ((8, 8), (32, 16), (16, 16), (24, 24)) for dtype in ("bfloat16", "float16")),
    pytest.param((32, 16), "float32", marks=pytest.mark.nightly),
], ids=str)  # fmt: skip
def test_loops_over_pairs_keep_everything_in_registers(widths, dtype, architecture, cache, tmp_path):
    pytest.importorskip("triton", reason="its wheel brings the disassembler")
    names = [name for name in kernel_names(*widths, dtype, dtype) if name.startswith(("symmetric", "segments"))]
    assert len(names) == 4
    for name, code in compile_kernels(names, architecture, cache=cache).items():
        _check_registers(name, architecture, code, tmp_path)


def test_a_newer_gpu_gets_ptx_which_its_driver_compiles():
    newest = cuda_compiler._nvrtc().nvrtcGetSupportedArchs()[-1][-1]
    code = compile_kernels([TINY], 999)[TINY]
    assert code.endswith(b"\0")
    assert f".target sm_{newest}".encode() in code
    assert b".entry reduce(" in code


@pytest.mark.parametrize(("architecture", "target"), [(75, None), (70, None), (0, None), (999, "cubin"), (75, "ptx")])
def test_a_gpu_that_cannot_be_served_is_refused(architecture, target):
    with pytest.raises(CompilerError, match=rf"compiles for sm_80, .*, not for sm_{architecture}"):
        compile_kernels([TINY], architecture, target=target)


def test_an_error_names_kernel_architecture_and_log():
    with pytest.raises(
        CompilerError, match=r"could not compile symmetric_9_1_1_1_0 for sm_90: NVRTC_ERROR_COMPILATION\n"
    ):
        compile_kernels(["symmetric_9_1_1_1_0"], 90)
    with pytest.raises(CompilerError, match="error"):
        compile_kernels(["symmetric_9_1_1_1_0"], 90)


@pytest.mark.parametrize("name", ["", "fused", "symmetric_1", "symmetric_1_2_1_1_0; }", "evil_1_2", "reduce_1"])
def test_what_is_no_kernel_is_not_compiled(name):
    with pytest.raises((ValueError, CompilerError)):
        compile_kernels([name], 90)


# --- the cache


def test_compiled_once(tmp_path, caplog, capfd, monkeypatch):
    """Compiling logs one line at level INFO. Reading from the cache logs nothing. Neither prints anything."""
    with caplog.at_level(logging.INFO, "minilm_kernels"):
        first = compile_kernels([TINY], 90, cache=KernelCache(tmp_path / "cache"))
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.INFO
    assert caplog.records[0].getMessage().startswith("compiled reduce for sm_90 in ")
    caplog.clear()
    monkeypatch.setattr(cuda_compiler, "_compile", None)  # any compilation would fail
    with caplog.at_level(logging.INFO, "minilm_kernels"):
        assert compile_kernels([TINY], 90, cache=KernelCache(tmp_path / "cache")) == first
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("change", ["architecture", "target", "options", "source", "version"])
def test_what_differs_is_compiled_anew(tmp_path, change, monkeypatch):
    compiled = []
    monkeypatch.setattr(cuda_compiler, "_compile", lambda *given: compiled.append(given) or b"code")
    cache = KernelCache(tmp_path / "cache")
    compile_kernels([TINY], 90, cache=cache)
    if change == "source":
        monkeypatch.setattr(cuda_compiler, "source", lambda places=False: "other")
    if change == "version":
        monkeypatch.setattr(cuda_compiler, "_version", lambda: "12.0")
    compile_kernels(
        [TINY], 80 if change == "architecture" else 90, cache=cache, target="ptx" if change == "target" else None,
        line_info=change == "options",
    )  # fmt: skip
    assert len(compiled) == 2
    assert len(cache.entries()) == 2


def test_a_cache_that_cannot_be_written_is_one_in_memory(tmp_path, caplog, monkeypatch):
    (tmp_path / "cache").write_text("a file in its place")
    cache = KernelCache(tmp_path / "cache")
    compiled = []
    monkeypatch.setattr(cuda_compiler, "_compile", lambda name, *_: compiled.append(name) or name.encode())
    for _ in range(2):
        assert compile_kernels([TINY, "symmetric_1_2_1_1_0"], 90, cache=cache)[TINY] == b"reduce"
    assert sorted(compiled) == [TINY, "symmetric_1_2_1_1_0"]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert VARIABLE in caplog.text


def test_a_process_has_one_cache():
    """If a kernel cannot be stored, a second device gets it from memory, without a second warning."""
    assert native.cuda.loader.cache is native.cuda.loader.cache


_COMPILE = """
import logging, sys
from minilm_kernels.relation.backends import cuda_compiler
from minilm_kernels.relation.backends.cuda_cache import KernelCache
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
code = cuda_compiler.compile_kernels(["reduce", "symmetric_1_1_1_1_0"], 90, cache=KernelCache())
assert all(kernel.startswith(bytes([127]) + b"ELF") for kernel in code.values())
"""


@pytest.mark.slow
def test_eight_processes_at_once(tmp_path):
    environment = {**os.environ, VARIABLE: str(tmp_path / "cache")}

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", _COMPILE],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def outcome(process: subprocess.Popen) -> str:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return said

    said = [outcome(process) for process in [start() for _ in range(8)]]
    assert all(line.startswith("compiled ") for text in said for line in text.splitlines())
    assert any(said)
    assert len(KernelCache(tmp_path / "cache").entries()) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert outcome(start()) == ""  # the next process compiles nothing


# --- missing parts


@pytest.mark.parametrize("error", [CompilerError("NVRTC could not"), RuntimeError("the driver could not")])
def test_auto_goes_on_where_kernels_cannot_be_compiled(new_gpu, monkeypatch, caplog, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cuda_compiler, "compile_kernels", fail)
    new_gpu()
    case = make()
    with caplog.at_level(logging.INFO, "minilm_kernels"):
        for _ in range(3):
            value, _ = case.run("sequence", "auto")
    torch.testing.assert_close(value, case.run("sequence", "torch")[0])
    warning = f"backend cuda failed; the next one serves the call: {error}"
    assert [record.getMessage() for record in caplog.records] == [warning]
    with pytest.raises(RuntimeError, match=str(error)):
        case.run("sequence", "cuda")


@pytest.mark.parametrize("stage", ["compile", "load"])
def test_only_the_kernel_that_fails_is_given_up(monkeypatch, stage):
    """It is tried once on each device. Calls that do not need it go on."""
    tried = []

    def compile_them(names, *_, **__):
        tried.extend(names)
        if stage == "compile" and "broken" in names:
            raise CompilerError("no code", "broken")
        return dict.fromkeys(names, b"code")

    def load(name, *_):
        if stage == "load" and name == "broken":
            raise RuntimeError("no code")

    monkeypatch.setattr(cuda_compiler, "compile_kernels", compile_them)
    operators = SimpleNamespace(load=load, capability=lambda _device: 90)
    loader = KernelLoader()
    for device in (0, 1):
        for _ in range(3):
            with pytest.raises(BackendUnavailable, match="no code"):
                loader.load(["broken", "shared"], device, operators)
            loader.load(["shared", "other"], device, operators)
        assert tried.count("broken") == device + 1


@pytest.fixture
def with_cuda(monkeypatch):
    """Makes PyTorch report a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native.cuda, "load_error", native.NOT_LOADED)
    cuda_compiler._nvrtc.cache_clear()
    yield
    monkeypatch.undo()
    cuda_compiler._nvrtc.cache_clear()


def test_nothing_is_missing(with_cuda):
    assert backend_status()["cuda"] == "ready"


@pytest.mark.parametrize(("missing", "reason"), [
    ("pytorch", "this PyTorch is built without CUDA"),
    ("device", "PyTorch finds no CUDA device"),
    ("library", "the package was installed without its CUDA library: no compiler was found"),
    ("sources", r"the kernels' sources are not in .*/cuda_device: reinstall the package"),
    ("bindings", "NVIDIA's Python bindings are not installed: pip install cuda-bindings"),
    ("nvrtc", r"NVRTC, CUDA's compiler library, cannot be loaded .*pip install cuda-bindings nvidia-cuda-nvrtc"),
])  # fmt: skip
def test_the_reason_says_what_is_missing(with_cuda, missing, reason, monkeypatch, tmp_path):
    if missing == "pytorch":
        monkeypatch.setattr(torch.version, "cuda", None)
    if missing == "device":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if missing == "library":
        (tmp_path / "_cuda.missing").write_text("no compiler was found", encoding="utf-8")
        monkeypatch.setattr(native.cuda, "library", tmp_path / "_cuda.abi3.so")
    if missing == "sources":
        monkeypatch.setattr(cuda_compiler, "_INSTALLED", tmp_path / "cuda_device")
        monkeypatch.setattr(cuda_compiler, "_CHECKOUT", tmp_path / "device")
    if missing == "bindings":
        monkeypatch.setitem(sys.modules, "cuda", None)
        monkeypatch.delitem(sys.modules, "cuda.bindings", raising=False)
    if missing == "nvrtc":
        monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
        import cuda.bindings

        monkeypatch.delattr(cuda.bindings, "nvrtc", raising=False)
    found = backend_status()["cuda"]
    assert found != "ready"
    assert re.match(reason, found), found


# --- python -m minilm_kernels precompile


@pytest.fixture
def precompile(tmp_path, monkeypatch, capsys):
    """Runs the command with some options and returns its output. Every shape has one small kernel."""
    monkeypatch.setattr(command, "kernel_names", lambda *_: [TINY])

    def run(*options: str, status: int = 0) -> tuple[str, str]:
        try:
            found = command.main(["precompile", "--cache", str(tmp_path / "cache"), *options])
        except SystemExit as end:
            found = end.code
        said = capsys.readouterr()
        assert found == status, said
        return said.out, said.err

    return run


def test_precompile_fills_lists_and_clears(precompile, tmp_path):
    out, err = precompile("--arch", "80", "9.0", "--widths", "16,8", "--widths", "64,32")
    lines = out.splitlines()
    assert re.fullmatch(r"sm_80 \[1/1\] reduce: \d+\.\d s, [\d,]+ bytes", lines[0])
    assert re.fullmatch(r"sm_90 \[1/1\] reduce: \d+\.\d s, [\d,]+ bytes", lines[1])
    assert len(lines) == 2
    assert err == ""
    assert {(entry["name"], entry["architecture"]) for entry in KernelCache(tmp_path / "cache").entries()} == {
        (TINY, 80),
        (TINY, 90),
    }
    out, _ = precompile("--arch", "90", "--widths", "16,8")
    assert out.startswith("sm_90 [1/1] reduce: from the cache, ")
    out, _ = precompile("--list")
    assert out.splitlines()[-1].startswith("2 kernels, ")
    assert re.match(r"sm_80 reduce cubin, NVRTC \d+\.\d+, [\d,]+ bytes", out)
    out, _ = precompile("--clear", "--list")
    assert out.startswith("removed 2 files from ")
    assert "0 kernels, 0 bytes" in out


@pytest.mark.parametrize(("options", "message"), [
    ((), "needs --arch and --widths, --list or --clear"),
    (("--arch", "90"), "needs --arch and --widths together"),
    (("--widths", "16,8"), "needs --arch and --widths together"),
    (("--arch", "75", "--widths", "16,8"), "expected a compute capability from 80 on, such as 90; got '75'"),
    (("--arch", "sm_90", "--widths", "16,8"), "expected a compute capability from 80 on, such as 90; got 'sm_90'"),
    (("--arch", "9", "--widths", "16,8"), "got '9'"),
    (("--arch", "8.0.0", "--widths", "16,8"), "got '8.0.0'"),
    (("--arch", "90", "--widths", "16"), "expected the head widths of teacher and student, such as 16,8; got '16'"),
    (("--arch", "90", "--widths", "16,0"), "got '16,0'"),
    (("--arch", "90", "--widths", "16,8,4"), "got '16,8,4'"),
    (("--arch", "90", "--widths", "16,8", "--dtype", "float64"), "invalid choice: 'float64'"),
    (("--lost",), "--lost"),
])  # fmt: skip
def test_precompile_refuses_what_it_does_not_understand(precompile, options, message):
    out, err = precompile(*options, status=2)
    assert message in err
    assert out == ""


def test_precompile_says_that_the_disk_is_full(precompile, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    _, err = precompile("--arch", "90", "--widths", "16,8", status=1)
    last = err.splitlines()[-1]
    assert last == f"python -m minilm_kernels: error: 1 of 1 kernels could not be stored in {tmp_path / 'cache'}"


def test_precompile_says_what_is_missing(precompile, monkeypatch):
    monkeypatch.setattr(cuda_compiler, "unavailable_reason", lambda: "NVIDIA's Python bindings are not installed")
    _, err = precompile("--arch", "90", "--widths", "16,8", status=1)
    assert err == "python -m minilm_kernels: error: NVIDIA's Python bindings are not installed\n"
