"""Launches of the CUDA backend and its calls of the driver library, which tests/ptx replaces."""

import ctypes
import logging
import subprocess
import sys
import threading

import pytest
import torch

from minilm_kernels.relation import dispatch
from minilm_kernels.relation.backends import cuda_compiler, native
from minilm_kernels.relation.inputs import BackendUnavailable
from tests.relation.cases import make

_SHAPE = {"widths": (16, 8), "dtype": torch.bfloat16, "heads": 2}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Replaces the compiler, since these tests execute no kernels. Returns the calls of the compiler."""
    calls = []

    def compile_kernels(names, architecture, **_):
        calls.append((list(names), architecture))
        return dict.fromkeys(names, b"no code\x00")

    monkeypatch.setattr(cuda_compiler, "compile_kernels", compile_kernels)
    return calls


def _run(reduction: str = "sequence", **more) -> None:
    make(**{**_SHAPE, **more}).run(reduction, "cuda")


def _names(gpu, calls):
    return [gpu.driver.functions[function][1] for function, *_ in calls]


def test_a_kernel_is_loaded_and_given_its_shared_memory_once(gpu):
    with gpu.recorded():
        for length in (40, 130, 40):
            _run(length=length)
    functions = [function for function, *_ in gpu.of("cuLaunchKernel")]
    assert _names(gpu, gpu.of("cuLaunchKernel")) == ["symmetric_1_2_1_1_0", "reduce", "scale"] * 3
    assert len(set(functions)) == len(gpu.of("cuModuleLoadData")) == 3
    # The driver is told to use the largest dynamic shared memory of a block, and all on-chip memory as shared memory.
    wanted = [call for function in functions[:3] for call in ((function, 8, 232448), (function, 9, 100))]
    assert sorted(gpu.of("cuFuncSetAttribute")) == sorted(wanted)


@pytest.mark.parametrize("reduction", ["sequence", "none"])
def test_launches_of_long_sequences(gpu, reduction):
    """Five launches with gradient, one in the backward, and a scratch memory that is a multiple of the gradient's."""
    with gpu.recorded():
        _run(reduction, length=9000, batch=1)
    names = _names(gpu, gpu.of("cuLaunchKernel"))
    segments = ["segments_1_2_1_1_0"] if reduction == "sequence" else []
    rows = ["row_stats_0_2_1_1_1", "row_wise_1_2_1_1_1"]
    if reduction == "sequence":
        assert names == [*segments, rows[0], *segments, rows[1], "reduce", "scale"]
    else:
        assert names == ["row_stats_1_2_1_1_1", "row_wise_0_2_1_1_1", *rows]  # rows first, then their gradient


def test_every_device_gets_its_own_kernels_in_its_own_context(new_gpu, compiled):
    gpus = [new_gpu(90), new_gpu(80, 166912, 167936)]
    launched = []
    for gpu in (*gpus, gpus[0]):
        native.cuda.device = lambda _device, gpu=gpu: (gpu.number, 0)
        gpu.calls.clear()
        with gpu.recorded():
            _run()
        launched.append([function for function, *_ in gpu.of("cuLaunchKernel")])
        assert {context for _, context, _ in gpu.of("cuModuleLoadData")} <= {gpu.context}
    assert launched[0] == launched[2]
    assert not set(launched[0]) & set(launched[1])
    assert [architecture for _, architecture in compiled] == [90, 90, 80, 80]


@pytest.mark.parametrize("before", [0, 1003, "own"])
@pytest.mark.parametrize("failing", ["", "cuLaunchKernel", "cuModuleLoadData"])
def test_the_threads_context_stays(gpu, before, failing):
    library = gpu.driver.library
    context, current = gpu.context if before == "own" else before, ctypes.c_uint64()
    library.cuCtxSetCurrent(ctypes.c_uint64(context))
    gpu.failing = failing
    try:
        with gpu.recorded():
            if failing:
                with pytest.raises(RuntimeError, match=failing):
                    _run()
            else:
                _run()
        library.cuCtxGetCurrent(ctypes.byref(current))
    finally:
        library.cuCtxSetCurrent(ctypes.c_uint64(0))
    assert current.value == context
    pushed = 0 if before == "own" else 1
    assert bool(gpu.of("cuCtxPushCurrent_v2")) == bool(pushed)
    assert len(gpu.of("cuCtxPushCurrent_v2")) == len(gpu.of("cuCtxPopCurrent_v2"))


def test_launches_of_several_lengths_on_several_threads(gpu):
    lengths = (40, 130, 500, 2000)
    alone = {}
    for length in lengths:
        with gpu.recorded():
            _run(length=length, batch=1)
        alone[length] = [shared for _, _, shared in gpu.of("cuLaunchKernel")]
        gpu.calls.clear()
    failures = []

    def work(length: int) -> None:
        try:
            for _ in range(10):
                _run(length=length, batch=1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(length,)) for length in lengths]
    with gpu.recorded():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
    assert failures == []
    assert gpu.of("cuFuncSetAttribute") == []
    together = sorted(shared for _, _, shared in gpu.of("cuLaunchKernel"))
    assert together == sorted(shared for shares in alone.values() for shared in shares * 10)


def test_threads_that_miss_the_same_kernels_load_them_once(gpu, compiled):
    ready = threading.Barrier(4)

    def work() -> None:
        ready.wait(600)
        _run()

    threads = [threading.Thread(target=work) for _ in range(4)]
    with gpu.recorded():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(600)
    assert [names for names, _ in compiled] == [["symmetric_1_2_1_1_0", "reduce"], ["scale"]]
    assert len(gpu.of("cuModuleLoadData")) == 3
    assert len(gpu.of("cuLaunchKernel")) == 12


# The call fails before the first launch of a process, or in a launch.
@pytest.mark.parametrize("call", [
    "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent_v2",
    "cuThreadExchangeStreamCaptureMode", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute",
    "cuFuncSetAttribute", "cuLaunchKernel",
])  # fmt: skip
def test_an_error_names_the_call(gpu, call, caplog):
    gpu.failing = call
    with gpu.recorded(), pytest.raises(RuntimeError, match=rf"{call.removesuffix('_v2')}: invalid argument"):
        _run()
    # Calls succeed again as soon as the driver's calls succeed.
    gpu.failing = ""
    native.cuda.loader.failed.clear()
    with gpu.recorded():
        _run()


@pytest.mark.parametrize("call", ["cuDeviceGet", "cuModuleLoadData"])
def test_auto_goes_on_where_the_driver_does_not(gpu, call, caplog):
    gpu.failing = call
    case = make(**_SHAPE)
    expected, _ = case.run("sequence", "torch")
    with gpu.recorded():
        value, _ = case.run("sequence", "auto")
    torch.testing.assert_close(value, expected)


def test_a_launch_that_fails_is_an_error(gpu):
    """An earlier kernel may have failed, so no other backend may take over."""
    gpu.failing = "cuLaunchKernel"
    with gpu.recorded(), pytest.raises(RuntimeError, match="symmetric_1_2_1_1_0: cuLaunchKernel: invalid argument"):
        make(**_SHAPE).run("sequence", "auto")


@pytest.mark.parametrize("failing", ["", "cuModuleLoadData"])
def test_loading_is_allowed_while_a_graph_is_captured(gpu, failing):
    relaxed = 2
    gpu.failing = failing
    with gpu.recorded():
        try:
            _run()
        except BackendUnavailable:
            assert failing
    modes = [(new, before) for _, new, before in gpu.of("cuThreadExchangeStreamCaptureMode")]
    assert modes == [(relaxed, 0), (0, relaxed)] * (len(modes) // 2)
    assert modes
    assert {mode for _, _, mode in gpu.of("cuModuleLoadData")} == {relaxed}


def test_the_stream_is_handed_through(gpu):
    gpu.stream = 0x7FFF_1234_5678
    with gpu.recorded():
        make(cross=True, **_SHAPE).run("sequence", "cuda")
    assert {stream for _, stream, _ in gpu.of("cuLaunchKernel")} == {gpu.stream}


def test_more_blocks_than_a_launch_takes_are_refused(gpu, compiled):
    """The error occurs before memory is allocated and before anything is compiled or launched."""
    heads = 2**30
    teacher, student = (torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16).expand(1, 1, heads, 8) for _ in range(2))
    values = torch.empty(3)
    with gpu.recorded(), pytest.raises(RuntimeError, match="more than 2\\^31 - 1 thread blocks"):
        torch.ops.minilm_kernels_cuda.relation_kl(
            [teacher], [student], [0, 0] * 3, [1.0] * 6, None, None, None, None, -1, False, "sum", None, None, values,
            None, [], 0, gpu.number,
        )  # fmt: skip
    assert gpu.of("cuLaunchKernel") == []


@pytest.mark.parametrize("capability", [75, 70])
def test_a_gpu_of_before_8_0_is_refused(new_gpu, capability):
    new_gpu(capability)
    with pytest.raises(RuntimeError, match=f"compute capability 8.0 or more, this one has 7.{capability % 10}"):
        _run()


_ALONE = """
import ctypes, sys, torch
from minilm_kernels.relation.backends import native
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(native.cuda.library)
try:
    torch.ops.minilm_kernels_cuda.capability(0)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "the driver library does not open"),
        ("", "the driver library has no cuLaunchKernel"),
    ],
    ids=["missing", "of an old version"],
)
def test_no_driver_library_to_use(gpu, tmp_path, source, expected):
    command = [sys.executable, "-c", _ALONE]
    if source is not None:
        library = tmp_path / "libcuda.so.1"
        flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
        subprocess.run(["gcc", *flags, "-o", library], input=source, text=True, check=True, timeout=600)
        command.append(str(library))
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert f"backend cuda: {expected}" in said


def test_a_process_does_not_load_kernels_for_ever(gpu, monkeypatch, caplog):
    monkeypatch.setattr(native.cuda.loader, "limit", 4)
    _run()
    _run(dtype=torch.float16)
    with pytest.raises(RuntimeError, match="more than 4 kernels"):
        _run(dtype=torch.float32)
    case = make(**{**_SHAPE, "dtype": torch.float32})
    with caplog.at_level(logging.INFO, "minilm_kernels"):
        for _ in range(3):
            value, _ = case.run("sequence", "auto")
    torch.testing.assert_close(value, case.run("sequence", "torch")[0])
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert len(warnings) == 1
    assert "backend cuda failed; the next one serves the call" in warnings[0]
    _run()  # loaded kernels still work


def test_threads_warn_once(monkeypatch):
    """A second thread warns while the first one is about to."""
    said = []

    def warning(message):
        said.append(message)
        if len(said) == 1:
            other = threading.Thread(target=dispatch.warn_once, args=(message,))
            other.start()
            other.join(600)

    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch._log, "warning", warning)
    dispatch.warn_once("a warning of this test")
    assert said == ["a warning of this test"]
