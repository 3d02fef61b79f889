"""A relation-like Triton kernel whose cost per pair can be counted by hand, with the declaration for the tool."""

import triton
import triton.language as tl


@triton.jit
def _sums(q, K, n, first, last, stride, D: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """(M,) sums of 2 to the power of the scores: D multiply-adds, one exponential and one addition per pair."""
    total = tl.zeros((q.shape[0],), tl.float32)
    # static: begin main
    for j in range(first, last, N):
        columns = j + tl.arange(0, N)
        k = K + columns[:, None] * stride + tl.arange(0, D)[None, :]
        if MASKED:
            # static: begin masked
            s = tl.dot(q, tl.trans(tl.load(k, mask=columns[:, None] < n, other=0.0)))
            e = tl.where(columns[None, :] < n, tl.math.exp2(s), 0.0)
            # static: end masked
        else:
            e = tl.math.exp2(tl.dot(q, tl.trans(tl.load(k))))
        total += tl.sum(e, 1)
    # static: end main
    return total


@triton.jit
def row_sums(inputs, Out, n, stride, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    Q, K = inputs
    rows = tl.program_id(0) * M + tl.arange(0, M)
    q = tl.load(Q + rows[:, None] * stride + tl.arange(0, D)[None, :])
    whole = n // N * N
    total = _sums(q, K, n, 0, whole, stride, D, N, False)
    total += _sums(q, K, n, whole, n, stride, D, N, True)
    tl.store(Out + rows, total)


@triton.jit
def scale(Out, BLOCK: tl.constexpr):
    """A kernel whose work does not grow with the pairs."""
    at = Out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * 2)


def variants(arch: int) -> list[dict]:
    M, N, D = 64, 32, 16
    work = {"pairs": M * N, "exponentials": M * N, "tensor_macs": M * N * D}
    return [
        {
            "kernel": "row_sums",
            "fn": row_sums,
            "signature": {"inputs": ("*bf16", "*bf16"), "Out": "*fp32", "n": "i32", "stride": "i32"}
            | dict.fromkeys("MND", "constexpr"),
            "constants": {"M": M, "N": N, "D": D},
            "divisible_by_16": ("inputs", "Out", "stride"),
            "options": {"num_warps": 4, "num_stages": 2},
            "dtype": "bfloat16",
            "d_t": 16,
            "d_s": 16,
            "loops": [
                {"phase": "whole", "marker": "main", **work},
                {"phase": "rest", "marker": "main+masked", **work},
            ],
        },
        {
            "kernel": "scale",
            "fn": scale,
            "signature": {"Out": "*fp32", "BLOCK": "constexpr"},
            "constants": {"BLOCK": 128},
            "dtype": "bfloat16",
            "d_t": D,
            "d_s": D,
            "loops": [],
        },
    ]
