"""A stand-in for a CUDA device: Python imports a copy of this file, named sitecustomize.py, when it starts.

`torch.cuda` describes a device, and tensors on "cuda" are on the CPU. The `torch` backend computes what `cuda` and
`triton` should, and every shape is made tiny: the stand-in tests plans, not kernels.
"""

import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch._dynamo  # it looks at the functions of torch, which are replaced below
from torch.overrides import TorchFunctionMode


class OnCPU(TorchFunctionMode):
    """Replaces the device "cuda" in the arguments of every function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = {name: _on_cpu(x, name == "device") for name, x in (kwargs or {}).items()}
        moves = getattr(function, "__name__", "") == "to"
        return function(*(_on_cpu(x, moves) for x in args), **given)


def _on_cpu(x, names_device):
    """Backends have names, too, and one of them is "cuda"."""
    named = isinstance(x, torch.device) or (names_device and isinstance(x, str))
    return "cpu" if named and str(x).startswith("cuda") else x


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(torch.Generator, "cpu")


class Event:
    def __init__(self, enable_timing=False):
        self.stamp = 0.0

    def record(self):
        self.stamp = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.stamp - self.stamp)


class CUDAGraph:
    def replay(self):
        pass


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@contextmanager
def _profile():
    yield


def replace_device() -> None:
    properties = {"major": 9, "minor": 0, "multi_processor_count": 4, "total_memory": 2**36, "L2_cache_size": 2**16}
    zero = dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda *_: 0)
    nothing = dict.fromkeys(
        (
            *("synchronize", "empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction"),
            "set_device",
        ),
        lambda *_: None,
    )
    replaced = {
        **{"is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda *_: "H100 (stand-in)"},
        **{"get_device_properties": lambda *_: SimpleNamespace(**properties)},
        **{"Event": Event, "CUDAGraph": CUDAGraph, "graph": lambda graph: nullcontext(), "Stream": Stream},
        **{"stream": lambda other: nullcontext(), "current_stream": lambda *_: Stream()},
        **{"profiler": SimpleNamespace(profile=_profile)},
        **nothing,
        **zero,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.version.cuda = "13.0"
    torch.Generator = Generator
    torch.compile = lambda function=None, **_: function if function is not None else lambda inner: inner
    OnCPU().__enter__()


def replace_kernels_and_shapes() -> None:
    from benchmarks import roofline, suites
    from benchmarks.measure import correctness, workload
    from minilm_kernels.relation import dispatch

    for name in ("cuda", "triton"):
        dispatch.MODULES[name] = dispatch.MODULES["torch"]
    correctness.TOLERANCE.update(dict.fromkeys(correctness.TOLERANCE, 10.0))  # bfloat16 errs more on few tokens
    roofline.rate = lambda device: (1.0, 0.0)
    parse, measure = workload.Workload.parse, suites.measure

    def parse_tiny(*args, **kwargs):
        made = parse(*args, **kwargs)
        return workload.replace(made, B=min(made.B, 2), A=2, S=min(made.S, 12))

    def measure_tiny(options):
        options.seconds, options.budget, options.repeat = 0.01, 2**21, min(options.repeat, 2)
        options.max_batch = 2
        if options.suite == "variants" and options.variants is None:
            options.variants = ["cuda", "cuda, 8 warps", "triton", "triton, 1 stage"]
        if options.suite == "train_step":
            options.shapes, options.rounds, options.timeout = ["tiny:2x64"], 2, 600.0
        if options.suite == "data":
            options.shapes, options.rounds, options.text = ["tiny:2x64"], 2, 2**16
        if options.suite == "inference":
            from benchmarks.suites import inference
            from minilm_kernels.students import student_config

            options.shapes = ["1x8"]
            inference.students = lambda: {inference.BASE: (1.0, None)}
            inference.student_config = lambda config, layers, hidden: student_config(config, 1, 48)
        if options.suite == "accuracy":
            from benchmarks.suites import accuracy

            accuracy._SMALL = workload.Workload(1, 1, 16, 16, 16)
        return measure(options)

    workload.Workload.parse, suites.measure = parse_tiny, measure_tiny


if __name__ == "sitecustomize":
    replace_device()
    replace_kernels_and_shapes()
