"""python -m tests.ptx.host_cost: host time of a CUDA launch, minus the time of an operator that does nothing.

Both operators get the same arguments. The package's library calls the replaced driver library, which does nothing
either. The difference is therefore the package's own work. Each figure is the smallest of many medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minilm_kernels.relation.backends import native

from .build import FOLDER, NATIVE, compiled, kept
from .driver import driver

_GPU = 4
# Indices of the relations' tensors, 0 (query), 1 (key) and 2 (value), and whether sequences are packed.
CALLS = {
    "MiniLMv2, q-q k-k v-v": ([0, 0, 1, 1, 2, 2], False),
    "MiniLM, q-k v-v": ([0, 1, 2, 2], False),
    "packed, some sequences row-wise": ([0, 0, 1, 1, 2, 2], True),
}


def _nothing(folder: Path) -> Callable:
    source, torch_folder = NATIVE / "nothing.cpp", Path(torch.__file__).parent

    def make(place: Path) -> None:
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        flags += ["-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        compiled(["g++", str(source), *flags, "-o", str(place / "nothing.so")], "the operator that does nothing")

    torch.ops.load_library(kept(folder, "nothing", [source, torch.__version__], make) / "nothing.so")
    return torch.ops.minilm_kernels_nothing.relation_kl.default


def _arguments(pairs: list[int], packed: bool) -> tuple:
    token_shape = (3000,) if packed else (8, 128)
    teacher, student = (
        [torch.randn(*token_shape, 4, width).bfloat16() for _ in range(max(pairs) + 1)] for width in (16, 8)
    )
    relations = [tuple(pairs[k : k + 2]) for k in range(0, len(pairs), 2)]
    grads = [torch.empty(student[0].shape) for pair in relations for _ in dict.fromkeys(pair)]
    bounds = torch.tensor([0, 100, 3000], dtype=torch.int32) if packed else None
    scales, values = [0.25, 0.35] * len(relations), torch.empty(len(relations))
    return (teacher, student, pairs, scales, None, bounds, None, None, -1, False, "sequence", None, None, values, None,
            grads, 0, _GPU)  # fmt: skip


def _microseconds(call: Callable, arguments: tuple, calls: int = 200) -> float:
    taken = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call(*arguments)
        taken.append(time.perf_counter_ns() - begin)
    return statistics.median(taken) / 1000


def measure(repeats: int = 50, folder: Path = FOLDER) -> dict[str, tuple[int, float, float]]:
    """Returns, for each of CALLS, the launches and the microseconds of the operator and of the empty operator."""
    standin = driver(folder)
    standin.set_gpu(_GPU, 90, 232448, 233472)
    torch.ops.load_library(native.cuda.library)
    operators, nothing = torch.ops.minilm_kernels_cuda, _nothing(folder)
    launched: list[int] = []
    results = {}
    for label, call in CALLS.items():
        arguments = _arguments(*call)
        for name in operators.relation_kl(*arguments).split():
            operators.load(name, torch.zeros(64, dtype=torch.uint8), _GPU)
        with standin.recorded(lambda name, *_: launched.append(1) if name == "cuLaunchKernel" else None):
            launched.clear()
            assert operators.relation_kl(*arguments) == ""
        with standin.silent():
            times = [
                (_microseconds(operators.relation_kl.default, arguments), _microseconds(nothing, arguments))
                for _ in range(repeats)
            ]
        results[label] = (len(launched), *(min(medians) for medians in zip(*times, strict=True)))
    return results


def main() -> None:
    torch.set_num_threads(1)
    for label, (launches, ours, nothing) in measure().items():
        print(
            f"{label}: {launches} launches, {(ours - nothing) / launches:.2f} µs each beyond the "
            f"{nothing:.2f} µs of an operator that does nothing"
        )


if __name__ == "__main__":
    main()
