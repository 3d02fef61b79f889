"""Moves and conversions."""

from __future__ import annotations

import numpy as np

from tests.ptx.memory import PARAMETER_WINDOW, SHARED_WINDOW
from tests.ptx.parser import WIDTHS, Symbol, Vector

from .arithmetic import assign, flush, kind_of

_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Converts float32 to bfloat16, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def float16_bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def _to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Converts to an integer type with saturation. NaN becomes 0."""
    info = np.iinfo(dtype)
    wide = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2.0**70, neginf=-(2.0**70))
    inside = np.clip(wide, float(info.min), float(info.max))
    value = np.where(wide >= float(info.max), info.max, np.where(wide <= float(info.min), info.min, 0))
    between = (wide < float(info.max)) & (wide > float(info.min))
    return np.where(between, np.where(between, inside, 0).astype(dtype), value.astype(dtype))


def _build_cvt(machine, instruction):
    to, source_kind = kind_of(instruction, 0), kind_of(instruction, 1)
    if to in ("bf16x2", "f16x2"):
        return _pack(machine, instruction, to)
    target = machine.target(instruction.operands[0], to)
    a = machine.source(instruction.operands[1], source_kind)
    rounding = next((_ROUNDING[part] for part in instruction.opcode if part in _ROUNDING), None)
    flushed = "ftz" in instruction.opcode
    floating = {"f32", "f64", "f16", "bf16"}
    dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{WIDTHS[to] // 8}") if to not in floating else None

    def operation(active) -> None:
        x = a
        if source_kind == "bf16":
            x = from_bfloat16(x)
        elif source_kind == "f16":
            x = from_float16(np.ascontiguousarray(x))
        if flushed:
            x = flush(x)
        if rounding is not None:
            x = rounding(x)
        if dtype is not None:
            value = _to_integer(x, dtype) if source_kind in floating else x.astype(dtype)
        elif to == "bf16":
            value = bfloat16_bits(np.asarray(x, np.float32))
        elif to == "f16":
            value = float16_bits(np.asarray(x, np.float32))
        else:
            value = x.astype(np.float32 if to == "f32" else np.float64)
        assign(target, active, value)

    if "sat" in instruction.opcode:
        raise NotImplementedError(instruction.text)
    return operation


def _pack(machine, instruction, to: str):
    """Conversion of two operands to one register; the second operand is in its lower half."""
    if "rn" not in instruction.opcode or "relu" in instruction.opcode:
        raise NotImplementedError(instruction.text)
    target = machine.target(instruction.operands[0], "b32")
    high, low = (machine.source(x, "f32") for x in instruction.operands[1:3])
    bits = bfloat16_bits if to == "bf16x2" else float16_bits

    def operation(active) -> None:
        assign(target, active, bits(np.asarray(high)).astype(np.uint32) << np.uint32(16) | bits(np.asarray(low)))

    return operation


def _build_mov(machine, instruction):
    kind = kind_of(instruction)
    to, source = instruction.operands
    if isinstance(to, Vector):
        return _unpack(machine, to, machine.source(source, f"b{WIDTHS[kind]}"))
    if isinstance(source, Vector):
        return _join(machine, machine.target(to, f"b{WIDTHS[kind]}"), source)
    target = machine.target(to, kind)
    value = machine.source(source, kind)
    if isinstance(source, Symbol) and source.name not in machine.kernel.shared:
        value = np.uint64(PARAMETER_WINDOW + machine.address_of(source.name))

    def operation(active) -> None:
        assign(target, active, value)

    return operation


def _unpack(machine, to: Vector, source):
    width = source.dtype.itemsize // len(to.items)
    targets = [machine.target(item, f"b{8 * width}") for item in to.items]

    def operation(active) -> None:
        parts = source.copy().view(f"u{width}").reshape(-1, len(targets))
        for k, target in enumerate(targets):
            assign(target, active, parts[:, k])

    return operation


def _join(machine, target, source: Vector):
    width = target.dtype.itemsize // len(source.items)
    parts = [machine.source(item, f"b{8 * width}") for item in source.items]

    def operation(active) -> None:
        both = np.empty((machine.threads, len(parts)), f"u{width}")
        for k, part in enumerate(parts):
            both[:, k] = part
        assign(target, active, both.view(target.dtype)[:, 0])

    return operation


def _build_cvta(machine, instruction):
    """cvta. Global and parameter addresses are already generic; shared addresses are moved to their window."""
    window = np.uint64(SHARED_WINDOW if "shared" in instruction.opcode else 0)
    target = machine.target(instruction.operands[0], "u64")
    value = machine.source(instruction.operands[1], "u64")
    back = "to" in instruction.opcode

    def operation(active) -> None:
        assign(target, active, value - window if back else value + window)

    return operation


BUILDERS = {"cvt": _build_cvt, "mov": _build_mov, "cvta": _build_cvta}
