"""Arithmetic, logic, comparison and selection, for each thread separately."""

from __future__ import annotations

import numpy as np

from tests.ptx.parser import WIDTHS, Immediate

_UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def kind_of(instruction, which: int = -1) -> str:
    """The last type in an opcode, or the one at index `which` among its types."""
    return [part for part in instruction.opcode if part in WIDTHS][which]


def assign(target: np.ndarray, active, value) -> None:
    np.copyto(target, value, casting="unsafe", where=True if active.full else active.mask)


def flush(x: np.ndarray) -> np.ndarray:
    """Replaces subnormal numbers by zeros of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _simple(function, arity: int):
    """A builder for instructions that compute function(a, b, ...) of operands of one type."""

    def build(machine, instruction):
        kind = kind_of(instruction)
        target = machine.target(instruction.operands[0], kind)
        sources = [machine.source(x, kind) for x in instruction.operands[1 : 1 + arity]]
        flushed = "ftz" in instruction.opcode and kind == "f32"

        if flushed:

            def operation(active) -> None:
                assign(target, active, flush(function(*map(flush, sources))))

        elif isinstance(function, np.ufunc) and target.dtype == sources[0].dtype:

            def operation(active) -> None:
                function(*sources, out=target, where=True if active.full else active.mask)

        else:

            def operation(active) -> None:
                assign(target, active, function(*sources))

        return operation

    return build


def _float_pairs(function, arity: int, build):
    """A builder for f32x2, whose registers hold two float32, and for the other types, which `build` takes."""

    def build_pairs(machine, instruction):
        if kind_of(instruction) != "f32x2":
            return build(machine, instruction)
        if not {"rn", "f32x2"}.issuperset(instruction.opcode[1:]):
            raise NotImplementedError(instruction.text)
        target, *sources = (
            place(operand, "f32x2").view(np.float32)
            for place, operand in zip((machine.target, *[machine.source] * arity), instruction.operands, strict=True)
        )

        def operation(active) -> None:
            np.copyto(target, function(*sources), where=active.mask.repeat(2))

        return operation

    return build_pairs


def _fma(a, b, c):
    """a * b + c, rounded to 53 bits and then to 24. It differs from a single rounding in about one of 2^29 cases."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(b), a // np.where(b == 0, 1, b).astype(b.dtype))
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // safe
    return quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))  # towards zero


def _remainder(a, b):
    return a - _divide(a, b).astype(a.dtype) * b


def _build_mul(machine, instruction):
    kind = kind_of(instruction)
    if "wide" in instruction.opcode:
        return _wide(machine, instruction, kind, with_sum=False)
    if "hi" in instruction.opcode:
        return _high(machine, instruction, kind)
    return _simple(np.multiply, 2)(machine, instruction)


def _build_mad(machine, instruction):
    kind = kind_of(instruction)
    if "wide" in instruction.opcode:
        return _wide(machine, instruction, kind, with_sum=True)
    if "lo" not in instruction.opcode:
        raise NotImplementedError(instruction.text)
    return _simple(lambda a, b, c: a * b + c, 3)(machine, instruction)


def _wide(machine, instruction, kind: str, with_sum: bool):
    wide = _WIDER[kind]
    target = machine.target(instruction.operands[0], wide)
    a, b = (machine.source(x, kind) for x in instruction.operands[1:3])
    c = machine.source(instruction.operands[3], wide) if with_sum else None

    def operation(active) -> None:
        product = np.multiply(a, b, dtype=target.dtype)
        assign(target, active, product if c is None else product + c)

    return operation


def _high(machine, instruction, kind: str):
    if WIDTHS[kind] != 32:
        return _simple(_high_64, 2)(machine, instruction)
    wide = np.int64 if kind[0] == "s" else np.uint64
    return _simple(lambda a, b: np.multiply(a, b, dtype=wide) >> wide(32), 2)(machine, instruction)


def _high_64(a, b):
    product = np.multiply(a.astype(object), np.asarray(b).astype(object)) >> 64
    return product.astype(a.dtype)


def _build_shift(machine, instruction):
    """Shifts. An amount of at least the width shifts all bits out."""
    left = instruction.opcode[0] == "shl"
    kind = kind_of(instruction)
    width = WIDTHS[kind]
    target = machine.target(instruction.operands[0], kind)
    a = machine.source(instruction.operands[1], kind)
    amount = machine.source(instruction.operands[2], "u32")
    signed = a.dtype.kind == "i"

    def operation(active) -> None:
        by = np.minimum(amount, width - 1).astype(a.dtype)
        value = a << by if left else a >> by
        if not (signed and not left):
            value = np.where(amount >= width, a.dtype.type(0), value)
        assign(target, active, value)

    return operation


def _build_bfe(machine, instruction):
    kind = kind_of(instruction)
    width = WIDTHS[kind]
    target = machine.target(instruction.operands[0], kind)
    a = machine.source(instruction.operands[1], kind)
    position, length = (machine.source(x, "u32") for x in instruction.operands[2:4])
    unsigned = _UNSIGNED[width]

    def operation(active) -> None:
        at = (position & np.uint32(0xFF)).astype(np.int64)
        size = np.minimum((length & np.uint32(0xFF)).astype(np.int64), width - at)
        left = np.clip(width - at - size, 0, width - 1)
        value = a << left.astype(a.dtype) if kind[0] == "s" else (a.view(unsigned) << left.astype(unsigned))
        right = np.clip(width - size, 0, width - 1)
        value = value >> right.astype(value.dtype)
        assign(target, active, np.where(size <= 0, value.dtype.type(0), value))

    return operation


def _build_bfi(machine, instruction):
    """bfi: replaces a field of bits in the second operand by the low bits of the first."""
    kind = kind_of(instruction)
    width, unsigned = WIDTHS[kind], _UNSIGNED[WIDTHS[kind]]
    target = machine.target(instruction.operands[0], kind)
    a, b = (machine.source(x, kind) for x in instruction.operands[1:3])
    position, length = (machine.source(x, "u32") for x in instruction.operands[3:5])

    def operation(active) -> None:
        at = (position & np.uint32(0xFF)).astype(np.int64)
        size = np.clip((length & np.uint32(0xFF)).astype(np.int64), 0, np.maximum(width - at, 0))
        ones = np.where(size > 0, unsigned(-1 & (1 << width) - 1) >> (width - np.maximum(size, 1)).astype(unsigned), 0)
        at = np.minimum(at, width - 1).astype(unsigned)
        bits = ones.astype(unsigned) << at
        assign(target, active, (a << at) & bits | b & ~bits)

    return operation


def _build_lop3(machine, instruction):
    target = machine.target(instruction.operands[0], "b32")
    a, b, c = (machine.source(x, "b32") for x in instruction.operands[1:4])
    assert isinstance(instruction.operands[4], Immediate)
    table = instruction.operands[4].value

    def operation(active) -> None:
        value = np.zeros_like(target)
        for case in range(8):
            if table >> case & 1:
                value |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        assign(target, active, value)

    return operation


def _build_prmt(machine, instruction):
    if instruction.opcode[-1] != "b32":
        raise NotImplementedError(instruction.text)
    target = machine.target(instruction.operands[0], "b32")
    a, b, selector = (machine.source(x, "b32") for x in instruction.operands[1:4])

    def operation(active) -> None:
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        value = np.zeros_like(target)
        for byte in range(4):
            choice = (selector >> np.uint32(4 * byte)) & np.uint32(15)
            picked = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(picked >= 128, np.uint32(255), np.uint32(0))
            value |= np.where(choice >= 8, sign, picked) << np.uint32(8 * byte)
        assign(target, active, value)

    return operation


_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ALIASES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, floating: bool):
    if not floating:
        return _ORDERED[_ALIASES.get(name, name)]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name.endswith("u"):
        return lambda a, b: _ORDERED[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return _ORDERED[name]


def _build_setp(machine, instruction):
    kind = kind_of(instruction)
    compare = _comparison(instruction.opcode[1], kind[0] == "f")
    combine = next((_COMBINE[part] for part in instruction.opcode[2:] if part in _COMBINE), None)
    result = instruction.operands[0]
    first = getattr(result, "first", result)
    target = machine.target(first, "pred")
    inverse = machine.target(result.second, "pred") if hasattr(result, "second") else None
    a, b = (machine.source(x, kind) for x in instruction.operands[1:3])
    c = machine.source(instruction.operands[3], "pred") if combine else None
    flushed = "ftz" in instruction.opcode

    def operation(active) -> None:
        value = compare(flush(a), flush(b)) if flushed else compare(a, b)
        if inverse is not None:
            assign(inverse, active, combine(~value, c) if combine else ~value)
        assign(target, active, combine(value, c) if combine else value)

    return operation


def _build_selp(machine, instruction):
    kind = kind_of(instruction)
    target = machine.target(instruction.operands[0], kind)
    a, b = (machine.source(x, kind) for x in instruction.operands[1:3])
    choice = machine.source(instruction.operands[3], "pred")

    def operation(active) -> None:
        assign(target, active, np.where(choice, a, b))

    return operation


def _build_min_max(machine, instruction):
    smaller = instruction.opcode[0] == "min"
    if "NaN" in instruction.opcode:
        return _simple(np.minimum if smaller else np.maximum, 2)(machine, instruction)
    return _simple(np.fmin if smaller else np.fmax, 2)(machine, instruction)


def _build_not(machine, instruction):
    if kind_of(instruction) == "pred":
        return _simple(np.logical_not, 1)(machine, instruction)
    return _simple(np.invert, 1)(machine, instruction)


def _build_logic(ufunc, logical):
    def build(machine, instruction):
        return _simple(logical if kind_of(instruction) == "pred" else ufunc, 2)(machine, instruction)

    return build


def _popcount(x):
    return np.bitwise_count(x)


BUILDERS = {
    "add": _float_pairs(np.add, 2, _simple(np.add, 2)),
    "sub": _float_pairs(np.subtract, 2, _simple(np.subtract, 2)),
    "mul": _float_pairs(np.multiply, 2, _build_mul),
    "mad": _build_mad,
    "fma": _float_pairs(_fma, 3, _simple(_fma, 3)),
    "div": _simple(_divide, 2),
    "rem": _simple(_remainder, 2),
    "neg": _simple(np.negative, 1),
    "abs": _simple(np.abs, 1),
    "min": _build_min_max,
    "max": _build_min_max,
    "rcp": _simple(lambda a: (1 / a).astype(a.dtype), 1),
    "sqrt": _simple(np.sqrt, 1),
    "rsqrt": _simple(lambda a: (1 / np.sqrt(a)).astype(a.dtype), 1),
    "ex2": _simple(np.exp2, 1),
    "lg2": _simple(np.log2, 1),
    "and": _build_logic(np.bitwise_and, np.logical_and),
    "or": _build_logic(np.bitwise_or, np.logical_or),
    "xor": _build_logic(np.bitwise_xor, np.logical_xor),
    "not": _build_not,
    "shl": _build_shift,
    "shr": _build_shift,
    "bfe": _build_bfe,
    "bfi": _build_bfi,
    "lop3": _build_lop3,
    "prmt": _build_prmt,
    "popc": _simple(_popcount, 1),
    "setp": _build_setp,
    "selp": _build_selp,
}
