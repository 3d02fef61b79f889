"""Mutants of the native CPU kernels: each is compiled."""

from . import Mutant

_DRIVER = "csrc/cpu/relation.cpp"
_KERNELS = "csrc/cpu/kernels.inl"
_NATIVE = "tests/relation/backends/test_native_cpu.py -k 'not peak_memory'"
_BOTH = "tests/relation/backends/test_native_cpu.py tests/relation/test_contract.py -k 'not peak_memory'"

MUTANTS = [
    Mutant(
        _DRIVER,
        "    if (gradient_ && !call_.packed) clear_hidden();\n",
        "",
        _BOTH,
        "gradients of padding are whatever was in memory",
    ),
    Mutant(
        _DRIVER,
        "        while (done.load(std::memory_order_acquire) < before) std::this_thread::yield();\n",
        "",
        _NATIVE,
        "a task's second phase begins before its first has ended",
    ),
    Mutant(
        _DRIVER,
        "return kl < 0.0 ? 0.0 : kl;",
        "return kl > 0.0 ? kl : 0.0;",
        _NATIVE,
        "a loss of NaN becomes 0, and training goes on",
    ),
    Mutant(
        _DRIVER,
        "if (!(range.high - range.low <= kWidestRange)) return false;",
        "if (range.high - range.low > kWidestRange) return false;",
        _NATIVE,
        "NaN passes for a narrow range",
        harmless="sums of NaN are NaN in both forms",
    ),
    Mutant(
        _DRIVER,
        "float reference = std::max(0.0f, range.high - kMostBits) + std::min(0.0f, range.low + kMostBits);",
        "float reference = 0.0f;",
        _NATIVE,
        "where all norms are large and equal, exponentials overflow",
    ),
    Mutant(
        _DRIVER,
        "constexpr float kWidestRange = 120.0f;",
        "constexpr float kWidestRange = 1200.0f;",
        _NATIVE,
        "sharp relations lose their rows to underflow",
    ),
    Mutant(
        _DRIVER,
        "task.exact = !gradient_ || task.length < kFewTokens;",
        "task.exact = false;",
        _BOTH,
        "single rows of small KL are lost in rounding",
    ),
    Mutant(
        _DRIVER,
        "task.prefix = all ? task.length : call_.prefixes ? std::min(call_.prefixes[n], task.length) : 0;",
        "task.prefix = all ? task.length : call_.prefixes ? call_.prefixes[n] : 0;",
        _BOTH,
        "a prefix beyond the sequence",
        harmless="prefixes arrive in gathered tokens, at most the length",
    ),
    Mutant(
        _DRIVER,
        "call_.weights && relation.teacher.scale >= 0 && relation.student.scale >= 0;",
        "call_.weights;",
        _BOTH,
        "negative scales are taken for positive ones",
    ),
    Mutant(
        _KERNELS,
        "mul(mul(p, delta), mul(delta, f)), kl);",
        "mul(mul(p, delta), delta), kl);",
        _BOTH,
        "the series of the exact form loses its factor",
    ),
    Mutant(
        _KERNELS,
        "kl = choose(magnitude_below(delta, 0.25f),",
        "kl = choose(magnitude_below(delta, 1.5f),",
        _BOTH,
        "the series is used where it no longer holds",
    ),
    Mutant(
        _KERNELS,
        "pairs.mirrored[r] = first_lanes(first + r < task.prefix ? before : 0);",
        "pairs.mirrored[r] = first_lanes(first + r <= task.prefix ? before : 0);",
        _BOTH,
        "one row too many is seen through a prefix",
    ),
    Mutant(
        _KERNELS,
        "return (block + 1) * V <= first && first + R <= task.prefix;",
        "return (block + 1) * V <= first && first < task.prefix;",
        _BOTH,
        "the rows at the end of a prefix are taken for rows inside it",
    ),
    Mutant(
        _KERNELS,
        "difference = choose(magnitude_below(q, 0.5f), difference, others);",
        "",
        _NATIVE,
        "gradients of one-hot rows are rounding",
    ),
    Mutant(
        _KERNELS,
        "rows_t[r] = real ? -inverse_t[first + r] : 0.0f;",
        "rows_t[r] = -inverse_t[first + r];",
        _NATIVE,
        "rows behind the end of a sequence join the gradient",
        harmless="symmetric_rows stores 0 for the inverse of a row behind the end",
    ),
    Mutant(
        _KERNELS,
        "int64_t least = first + 1 > task.prefix ? first + 1 : task.prefix;         // and the first one",
        "int64_t least = first + 2 > task.prefix ? first + 2 : task.prefix;         // and the first one",
        _BOTH,
        "the mask begins one key too late",
        harmless="the key before it is seen by every row of the strip; lanes round it down",
    ),
    Mutant(
        _KERNELS,
        "magnitude < 0x7c00u ? from_bits(magnitude << 13) * 0x1p112f",
        "magnitude < 0x7c00u ? from_bits((magnitude << 13) + 0x38000000u)",
        _BOTH,
        "subnormal float16 numbers become large",
    ),
    Mutant(
        _KERNELS,
        "if (++count % 512 == 0) fold();",
        "if (++count % 4096 == 0) fold();",
        _NATIVE,
        "the sum of logarithms overflows in long sequences",
    ),
]
