"""wgmma.mma_async of compute capability 9.0: products of four warps, with operands in shared memory.

A descriptor of an operand has the start address and two strides, in units of 16 bytes, and a swizzle. Products are
computed when they are issued. The emulator checks that ordinary stores to shared memory are followed by a
fence.proxy.async before a product reads them. It does not check that registers are unused until wgmma.wait_group.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tests.ptx.parser import Immediate, Vector

from .access import Port
from .convert import from_bfloat16, from_float16
from .mma import H100, multiply
from .warp import check_whole

_SWIZZLE = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor -> bytes of a swizzled row


class Operand:
    """An operand in shared memory: (64 or N, 16) elements of 16 bits for each group of four warps."""

    def __init__(self, machine, instruction, operand, rows: int, transposed: bool) -> None:
        self.descriptor = machine.source(operand, "u64")
        self.port = Port(machine, instruction, "shared")
        self.machine, self.instruction = machine, instruction
        self.rows, self.transposed = rows, transposed

    def load(self, leaders: np.ndarray) -> np.ndarray:
        """Returns the elements' bits, (groups, rows, 16). `leaders`: the first thread of each group."""
        descriptor = np.broadcast_to(self.descriptor, self.machine.threads)[leaders].astype(np.uint64)

        def field(low: int, bits: int) -> np.ndarray:
            return ((descriptor >> np.uint64(low)) & np.uint64((1 << bits) - 1)).astype(np.int64)

        start, leading, stride = field(0, 14) * 16, field(16, 14) * 16, field(32, 14) * 16
        mode = np.unique(field(62, 2))
        if mode.size != 1 or field(49, 3).any():
            raise NotImplementedError(f"{self.instruction.text}: descriptors differ, or have a base offset")
        width = _SWIZZLE[int(mode[0])]
        row, k = np.arange(self.rows)[:, None], np.arange(16)[None, :]
        start, leading, stride = (x[:, None, None] for x in (start, leading, stride))
        if not self.transposed:  # the 16 elements of a row are adjacent; groups of eight rows
            inside = k * 2 if width > 16 else k % 8 * 2
            across = 0 if width > 16 else k // 8 * leading
            offset = row // 8 * stride + row % 8 * width + inside + across
        else:  # the rows of one k are adjacent; groups of eight k
            chunk, byte = row * 2 // width, row * 2 % width
            along, beyond = (leading, stride) if width > 16 else (stride, leading)
            offset = chunk * along + k // 8 * beyond + k % 8 * width + byte
        address = start + offset
        if width > 16:  # the swizzle: the row's number permutes its 16-byte units
            address ^= (address >> 7 & (width // 16 - 1)) << 4
        threads = np.broadcast_to(leaders[:, None, None], address.shape).ravel()
        flat = self.port.load(address.ravel().astype(np.uint64), threads, 2, 1)
        self._check_fence(address, leaders)
        return flat.reshape(address.shape)

    def _check_fence(self, address: np.ndarray, leaders: np.ndarray) -> None:
        machine = self.machine
        index = machine.block_of[leaders][:, None, None] * machine.shared.stride + address
        stale = machine.shared.unfenced[index >> 1]
        if stale.any():
            machine.report(
                "stores that no fence.proxy.async shows to wgmma", self.instruction, leaders[stale.any((1, 2))]
            )


def _build_mma(machine, instruction):
    shape = next(part for part in instruction.opcode if part.startswith("m64"))
    columns, depth = (int(x) for x in re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
    to, left, right, keep, *flags = instruction.operands
    kinds = instruction.opcode[-3:]
    if depth != 16 or kinds[0] != "f32" or kinds[1] != kinds[2] or kinds[1] not in ("bf16", "f16"):
        raise NotImplementedError(instruction.text)
    flags = [flag.value for flag in flags]
    if flags[:2] != [1, 1]:
        raise NotImplementedError(f"{instruction.text}: negated operands")
    convert = from_bfloat16 if kinds[1] == "bf16" else from_float16
    targets = [machine.target(item, "f32") for item in to.items]
    in_registers = isinstance(left, Vector)
    transposed = flags[2:]
    registers = [machine.source(item, "b32") for item in left.items] if in_registers else []
    a = None if in_registers else Operand(machine, instruction, left, 64, bool(transposed[0]))
    b = Operand(machine, instruction, right, columns, bool(transposed[-1]))
    keeps = machine.source(keep, "pred") if not isinstance(keep, Immediate) else np.bool_(keep.value != 0)

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        leaders = machine.thread[active.mask].reshape(-1, 128)[:, 0]
        if (leaders % 128).any() or not active.mask.reshape(-1, 128).all(1)[leaders // 128].all():
            machine.report("part of four warps at an instruction of all", instruction, leaders)
        threads = leaders[:, None] + np.arange(128)
        if in_registers:
            parts = [convert(register[threads].view(np.uint16)).reshape(-1, 4, 8, 8) for register in registers]
            x = np.concatenate(
                [np.concatenate([parts[0], parts[2]], -1), np.concatenate([parts[1], parts[3]], -1)], 2
            ).reshape(-1, 64, 16)
        else:
            x = convert(a.load(leaders))
        y = convert(b.load(leaders))
        kept = np.broadcast_to(keeps, machine.threads)[threads]
        # (groups, warps, halves of 8 rows, rows, groups of 8 columns, lanes of a row, columns)
        sums = np.zeros((leaders.size, 4, 2, 8, columns // 8, 4, 2), np.float32)
        for register, part in zip(targets, _parts(sums), strict=True):
            part[...] = np.where(kept, register[threads], np.float32(0)).reshape(part.shape)
        before = sums.reshape(-1, 64, columns)
        sums = multiply(x.astype(np.float64), y.astype(np.float64), before, *H100).reshape(sums.shape)
        for register, part in zip(targets, _parts(sums), strict=True):
            register[threads] = part.reshape(-1, 128)

    return operation


def _parts(sums: np.ndarray) -> Iterator[np.ndarray]:
    """Yields what the accumulator's registers hold, (groups, warps, rows, lanes of a row)."""
    for j in range(sums.shape[4]):
        for half in range(2):
            for e in range(2):
                yield sums[:, :, half, :, j, :, e]


def _build_wgmma(machine, instruction):
    if instruction.opcode[1] == "mma_async":
        return _build_mma(machine, instruction)
    if instruction.opcode[1] in ("fence", "commit_group", "wait_group"):
        return lambda active: check_whole(machine, instruction, active)
    raise NotImplementedError(instruction.text)


BUILDERS = {"wgmma": _build_wgmma}
