"""Matrices of a warp: ldmatrix, stmatrix, movmatrix and mma.sync.

Lane 4g + t of a warp holds the elements (g, 2t) and (g, 2t + 1) of an 8 x 8 matrix of 16-bit elements in one register.
The registers of a warp, in the order of its lanes, are thus the matrix, row by row.

Products are exact. With `ACCUMULATE` "truncated", sums are those of tensor cores, after the models of Khattak and
Mikaitis (arXiv 2512.07004), which agree with GPUs bit by bit: a block of products is added to the accumulator at a
time, addends are truncated some bits below the leading bit of the largest one, and the sum is truncated to float32.
mma has the block and the bits of an A100, wgmma those of an H100. With "float64", sums are exact and rounded to float32
once.
"""

from __future__ import annotations

import numpy as np

from .access import Port, address_source
from .convert import from_bfloat16, from_float16
from .warp import check_whole

ACCUMULATE = "truncated"
A100, H100 = (8, 1), (16, 2)  # 16-bit products of a block, and bits of an addend beyond float32's 24


def _warps(active, machine):
    """The active warps, and their threads, (warps, 32)."""
    warps = np.arange(machine.warps) if active.full else active.warps
    return warps, warps[:, None] * 32 + np.arange(32)


def _build_ldmatrix(machine, instruction):
    if "m8n8" not in instruction.opcode or "b16" not in instruction.opcode:
        raise NotImplementedError(instruction.text)
    targets = [machine.target(item, "b32") for item in instruction.operands[0].items]
    addresses = address_source(machine, instruction.operands[1])
    transposed = "trans" in instruction.opcode
    port = Port(machine, instruction, "shared")
    count = len(targets)

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        warps, threads = _warps(active, machine)
        address = np.empty(machine.threads, np.uint64)
        address[machine.thread if active.full else active.threads] = addresses(active)
        rows = threads[:, : 8 * count].ravel()  # lanes 8k ... 8k + 7 name the rows of matrix k
        elements = _load_rows(port, address[rows], rows)
        elements = elements.reshape(warps.size, count, 8, 8)
        if transposed:
            elements = np.ascontiguousarray(elements.transpose(0, 1, 3, 2))
        words = elements.view(np.uint32).reshape(warps.size, count, 32)
        for k, target in enumerate(targets):
            target[threads] = words[:, k]

    return operation


def _load_rows(port: Port, address: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """Loads rows of 16 bytes as 16-bit elements, (n, 8)."""
    return port.load(address, threads, 4, 4).view(np.uint16)


def _build_stmatrix(machine, instruction):
    if "m8n8" not in instruction.opcode or "b16" not in instruction.opcode:
        raise NotImplementedError(instruction.text)
    addresses = address_source(machine, instruction.operands[0])
    sources = [machine.source(item, "b32") for item in instruction.operands[1].items]
    transposed = "trans" in instruction.opcode
    port = Port(machine, instruction, "shared")

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        warps, threads = _warps(active, machine)
        address = np.empty(machine.threads, np.uint64)
        address[machine.thread if active.full else active.threads] = addresses(active)
        elements = np.stack([source[threads] for source in sources], 1).view(np.uint16)
        elements = elements.reshape(warps.size, len(sources), 8, 8)
        if transposed:
            elements = elements.transpose(0, 1, 3, 2)
        rows = threads[:, : 8 * len(sources)].ravel()
        port.store(address[rows], rows, np.ascontiguousarray(elements).view(np.uint32).reshape(-1, 4))

    return operation


def _build_movmatrix(machine, instruction):
    target, source = machine.target(instruction.operands[0], "b32"), machine.source(instruction.operands[1], "b32")

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        warps, threads = _warps(active, machine)
        elements = source[threads].view(np.uint16).reshape(warps.size, 8, 8)
        turned = np.ascontiguousarray(elements.transpose(0, 2, 1))
        target[threads] = turned.view(np.uint32).reshape(warps.size, 32)

    return operation


def _build_mma(machine, instruction):
    opcode = instruction.opcode
    shape = next(part for part in opcode if part.startswith("m16"))
    types = opcode[-4:]
    if types[0] != "f32" or types[3] != "f32" or types[1] != types[2] or opcode[-6:-4] != ("row", "col"):
        raise NotImplementedError(instruction.text)
    d, a, b, c = (operand.items for operand in instruction.operands)
    a, b = ([machine.source(x, "b32") for x in items] for items in (a, b))
    c = [machine.source(x, "f32") for x in c]
    d = [machine.target(x, "f32") for x in d]
    if types[1] in ("bf16", "f16") and shape in ("m16n8k8", "m16n8k16"):
        convert = from_bfloat16 if types[1] == "bf16" else from_float16
        fetch = _fetch_halves(convert)
        block, bits = A100
    elif types[1] == "tf32" and shape in ("m16n8k4", "m16n8k8"):
        fetch = _fetch_tf32
        block, bits = A100[0] // 2, A100[1]
    else:
        raise NotImplementedError(instruction.text)
    steps = len(b)

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        warps, threads = _warps(active, machine)
        # a: the registers of rows 0 ... 7 and 8 ... 15, then those of the next columns. b is stored transposed.
        left = np.concatenate(
            [np.concatenate([fetch(a[2 * k + m], threads) for k in range(steps)], -1) for m in range(2)], 1
        )
        right = np.concatenate([fetch(b[k], threads) for k in range(steps)], -1)
        before = np.empty((warps.size, 2, 32, 2), np.float32)
        for m in range(2):
            for e in range(2):
                before[:, m, :, e] = c[2 * m + e][threads]
        after = multiply(left, right, before.reshape(warps.size, 16, 8), block, bits).reshape(warps.size, 2, 32, 2)
        for m in range(2):
            for e in range(2):
                d[2 * m + e][threads] = after[:, m, :, e]

    return operation


def _fetch_halves(convert):
    def fetch(register: np.ndarray, threads: np.ndarray) -> np.ndarray:
        bits = register[threads].view(np.uint16)
        return convert(bits).reshape(-1, 8, 8).astype(np.float64)

    return fetch


def _fetch_tf32(register: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """tf32 operands: lane 4g + t holds element (g, t), of which the upper 19 bits are used."""
    bits = register[threads] & np.uint32(0xFFFFE000)
    return bits.view(np.float32).reshape(-1, 8, 4).astype(np.float64)


def multiply(left: np.ndarray, right: np.ndarray, before: np.ndarray, block: int, bits: int) -> np.ndarray:
    """Returns a bᵀ + c in float32 for each group of threads, with a (w, m, k), b (w, n, k) and c (w, m, n)."""
    if ACCUMULATE == "float64":
        return (left @ right.transpose(0, 2, 1) + before).astype(np.float32)
    for k in range(0, left.shape[-1], block):
        before = _add_truncated(left[:, :, None, k : k + block] * right[:, None, :, k : k + block], before, bits)
    return before


def _add_truncated(products: np.ndarray, before: np.ndarray, bits: int) -> np.ndarray:
    """Adds (w, m, n, k) in float64 to `before`."""
    terms = np.concatenate([products, before.astype(np.float64)[..., None]], -1)
    largest = np.abs(terms).max(-1)
    if not np.isfinite(largest).all():
        return terms.sum(-1).astype(np.float32)
    exponent = np.frexp(largest)[1] - 24 - bits
    total = np.ldexp(np.trunc(np.ldexp(terms, -exponent[..., None])).sum(-1), exponent)
    rounded = total.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(total), np.nextafter(rounded, np.float32(0)), rounded)


BUILDERS = {"ldmatrix": _build_ldmatrix, "stmatrix": _build_stmatrix, "movmatrix": _build_movmatrix, "mma": _build_mma}
