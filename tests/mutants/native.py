"""Mutants of the native CPU kernels. Each is compiled."""

from . import Mutant

_DRIVER = "csrc/cpu/driver.cpp"
_SYMMETRIC = "csrc/cpu/symmetric.inl"
_ROW_WISE = "csrc/cpu/row_wise.inl"
_GATHER = "csrc/cpu/gather.inl"
_NUMERICS = "csrc/common/numerics.h"
_NATIVE = "tests/relation/backends/test_native_cpu.py -k 'not peak_memory'"
_BOTH = "tests/relation/backends/test_native_cpu.py tests/relation/test_contract.py -k 'not peak_memory'"

MUTANTS = [
    # Rows that count and keys with fewer heads.
    Mutant(
        _ROW_WISE,
        "if (r >= rows || !counts(task, first + r)) {",
        "if (r >= rows) {",
        _BOTH,
        "rows outside the query mask are computed and count",
    ),
    Mutant(
        _SYMMETRIC,
        "    if (!counts(task, i)) continue;\n",
        "",
        _BOTH,
        "the sums of rows outside the query mask are part of the loss",
    ),
    Mutant(
        _GATHER,
        "      if (x.queries != x.keys) clear_uncounted(*tasks[h], block, x.queries, x.width);\n",
        "",
        _BOTH,
        "a NaN in a query that does not count reaches the gradients of the keys",
    ),
    Mutant(
        _DRIVER,
        "task.student.key_head = a / relations_[r].student.group;",
        "task.student.key_head = a / relations_[r].teacher.group;",
        _BOTH,
        "the student's queries read the key heads of the teacher's groups",
    ),
    Mutant(
        _DRIVER,
        "if (!relation.self) clear(relation.key_grad, token / relation.student.group);",
        "if (!relation.self) clear(relation.key_grad, token);",
        _NATIVE,
        "gradients of padding are cleared beyond the end of a key with fewer heads",
    ),
    Mutant(
        _DRIVER,
        "    if (gradient_ && !call_.packed) clear_padding();\n",
        "",
        _BOTH,
        "gradients of padding are whatever was in memory",
    ),
    Mutant(
        _DRIVER,
        "        while (done.load(std::memory_order_acquire) < before) std::this_thread::yield();\n",
        "",
        _NATIVE,
        "the second phase of a task begins before the first has ended",
    ),
    Mutant(
        _DRIVER,
        "call_.values[r] = value < 0.0 ? 0.0f : static_cast<float>(value);",
        "call_.values[r] = value > 0.0 ? static_cast<float>(value) : 0.0f;",
        _NATIVE,
        "a NaN loss becomes 0, and training continues",
    ),
    Mutant(
        _DRIVER,
        "if (!(range.high - range.low <= kMaxNormRange)) return false;",
        "if (range.high - range.low > kMaxNormRange) return false;",
        _NATIVE,
        "NaN is accepted as a narrow range",
        harmless="sums of NaN are NaN in both forms",
    ),
    Mutant(
        _DRIVER,
        "float reference = std::max(0.0f, range.high - kMostBits) + std::min(0.0f, range.low + kMostBits);",
        "float reference = 0.0f;",
        _NATIVE,
        "exponentials overflow if all norms are large and equal",
    ),
    Mutant(
        _DRIVER,
        "constexpr float kMaxNormRange = 120.0f;",
        "constexpr float kMaxNormRange = 1200.0f;",
        _NATIVE,
        "rows of sharp relations underflow",
    ),
    Mutant(
        _DRIVER,
        "task.exact = !gradient_ || task.length < kMinSymmetricTokens;",
        "task.exact = false;",
        _BOTH,
        "small KL divergences of single rows are rounded away",
    ),
    Mutant(
        _DRIVER,
        "task.prefix = all ? task.length : call_.prefixes ? std::min(call_.prefixes[n], task.length) : 0;",
        "task.prefix = all ? task.length : call_.prefixes ? call_.prefixes[n] : 0;",
        _BOTH,
        "a prefix beyond the sequence",
        harmless="prefixes are counted in valid tokens and never exceed the length",
    ),
    Mutant(
        _DRIVER,
        "call_.weights && relation.teacher.scale >= 0 && relation.student.scale >= 0;",
        "call_.weights;",
        _BOTH,
        "negative scales are treated as positive",
    ),
    Mutant(
        _ROW_WISE,
        "mul(mul(p, delta), mul(delta, f)), kl);",
        "mul(mul(p, delta), delta), kl);",
        _BOTH,
        "the series of the exact form lacks a factor",
    ),
    Mutant(
        _ROW_WISE,
        "kl = select(magnitude_below(delta, 0.25f),",
        "kl = select(magnitude_below(delta, 1.5f),",
        _BOTH,
        "the series is used outside its range",
    ),
    Mutant(
        _SYMMETRIC,
        "pairs.mirrored[r] = first_lanes(first + r < task.prefix ? before : 0);",
        "pairs.mirrored[r] = first_lanes(first + r <= task.prefix ? before : 0);",
        _BOTH,
        "one row too many sees the keys of the prefix",
    ),
    Mutant(
        _SYMMETRIC,
        "return (block + 1) * V <= first && first + R <= task.prefix;",
        "return (block + 1) * V <= first && first < task.prefix;",
        _BOTH,
        "rows at the end of a prefix are treated as rows inside it",
    ),
    Mutant(
        _SYMMETRIC,
        "difference = select(magnitude_below(q, 0.5f), difference, others);",
        "",
        _NATIVE,
        "gradients of one-hot rows consist of rounding errors",
    ),
    Mutant(
        _SYMMETRIC,
        "rows_t[r] = valid ? -inverse_t[first + r] : 0.0f;",
        "rows_t[r] = -inverse_t[first + r];",
        _NATIVE,
        "rows beyond the end of a sequence contribute to the gradient",
        harmless="symmetric_rows stores 0 for the inverse of rows beyond the end",
    ),
    Mutant(
        _ROW_WISE,
        "int64_t least = first + 1 > task.prefix ? first + 1 : task.prefix;",
        "int64_t least = first + 2 > task.prefix ? first + 2 : task.prefix;",
        _BOTH,
        "the mask starts one key too late",
        harmless="every row of the row block sees the key before it; the start is rounded down to a block",
    ),
    Mutant(
        _NUMERICS,
        "magnitude < 0x7c00u ? as_float(magnitude << 13) * 0x1p112f",
        "magnitude < 0x7c00u ? as_float((magnitude << 13) + 0x38000000u)",
        _BOTH,
        "subnormal float16 numbers become large",
    ),
    Mutant(
        _SYMMETRIC,
        "if (++count % 512 == 0) renormalize();",
        "if (++count % 4096 == 0) renormalize();",
        _NATIVE,
        "the sum of logarithms overflows in long sequences",
    ),
]
