"""Finds registers of wgmma that are written before wgmma has read them.

HGMMA reads its first operand and the accumulator from registers while later instructions already run. The registers are
free when WARPGROUP.DEPBAR has waited for the group of the product. Versions of ptxas before CUDA 13.3 broke this rule,
which only the machine code shows.
"""

from __future__ import annotations

import re

from .loops import Flow
from .sass import Instruction

_OPERANDS = re.compile(r"R(\d+), (?:R(\d+)(?:\.reuse)?,)?")
_SHAPE = re.compile(r"HGMMA\.64x(\d+)x")
_RESULT = re.compile(r"(?:!?U?P\w+, )*R(\d+)\b")
_READS_ONLY = {"BAR", "BRX", "CALL", "JMX", "NANOSLEEP", "RET", "WARPSYNC"}
_MOST_GROUPS = 8  # number of groups that are distinguished; older groups are merged

# Registers in use: first those of the open group, then those of each closed group, with the newest last.
_State = tuple[frozenset[int], ...]


def early_writes(flow: Flow) -> tuple[int, list[str]]:
    """Counts HGMMA instructions, and finds instructions that may write to a register that HGMMA still reads.

    Follows every path through the code. A conditional write counts as a write.
    """
    states: dict[int, _State] = {0: (frozenset(),)}
    pending = [0]
    while pending:
        block = pending.pop()
        state, _ = _through(flow, block, states[block])
        for successor in flow.blocks[block].successors:
            known = states.get(successor)
            merged = state if known is None else _merged(known, state)
            if merged != known:
                states[successor] = merged
                pending.append(successor)
    count = sum(x.base == "HGMMA" for x in flow.code(flow.reachable))
    return count, [text for block in sorted(states) for text in _through(flow, block, states[block])[1]]


def _through(flow: Flow, block: int, state: _State) -> tuple[_State, list[str]]:
    """The state after a block, and the early writes in the block."""
    begin, found = flow.blocks[block].start, []
    open_group, *groups = state
    for index, instruction in enumerate(flow.code(frozenset([block])), begin):
        if instruction.base == "HGMMA":
            open_group |= _registers_of_product(instruction)
            if "gsb0" in instruction.operands:
                groups.append(open_group)
                open_group = frozenset()
                if len(groups) > _MOST_GROUPS:
                    groups[:2] = [groups[0] | groups[1]]
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            left = int(instruction.operands.rpartition(",")[2], 0)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
        elif written := _written(instruction) & open_group.union(*groups):
            names = ", ".join(f"R{register}" for register in sorted(written))
            found.append(f"{16 * index:04x}: {instruction.opcode} {instruction.operands} writes {names}")
    return (open_group, *groups), found


def _merged(x: _State, y: _State) -> _State:
    groups = max(len(x), len(y)) - 1
    padded = [(state[0], *[frozenset[int]()] * (groups + 1 - len(state)), *state[1:]) for state in (x, y)]
    return tuple(a | b for a, b in zip(*padded, strict=True))


def _registers_of_product(instruction: Instruction) -> frozenset[int]:
    shape, operands = _SHAPE.match(instruction.opcode), _OPERANDS.match(instruction.operands)
    if shape is None or operands is None or ".F32" not in instruction.opcode:
        raise ValueError(f"expected HGMMA.64xNx…F32 with its result in registers, got {instruction}")
    result = int(operands[1])
    registers = set(range(result, result + int(shape[1]) // 2))
    if operands[2]:
        registers |= set(range(int(operands[2]), int(operands[2]) + 4))
    return frozenset(registers)


def _written(instruction: Instruction) -> frozenset[int]:
    result = _RESULT.match(instruction.operands)
    if result is None or instruction.base in _READS_ONLY or instruction.predicate == "!PT":
        return frozenset()
    modifiers = instruction.opcode.split(".")[1:]
    wide = instruction.base in ("DADD", "DFMA", "DMUL", "FADD2", "FFMA2", "FMUL2") or {"64", "2", "WIDE"} & {*modifiers}
    count = 4 if {"128", "4"} & {*modifiers} or instruction.base == "HMMA" else 2 if wide else 1
    return frozenset(range(int(result[1]), int(result[1]) + count))
