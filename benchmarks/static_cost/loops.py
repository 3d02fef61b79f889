"""Loops of a function's machine code: basic blocks, control flow, dominators, natural loops.

A back edge t -> h is an edge whose target h dominates t. Its natural loop consists of h and of every block that reaches
t without passing h. Back edges to the same header form one loop. Convergence barriers are followed: BSYNC continues at
the label of the latest BSSY with the same barrier register. Paths that only a diverged warp takes are not followed:
`BRA.DIV` is never taken, `BRA.CONV` always.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .sass import Function, Instruction

_TARGET = re.compile(r"`\(([^)]+)\)")
_INDIRECT_TARGETS = re.compile(r"BRANCH_TARGETS ([^*\"]+)")
_ENDS = {"EXIT", "RET", "KILL"}
_JUMPS = {"BRA", "JMP", "BRX", "BRXU", "JMX", "JMXU"}


@dataclass
class Block:
    start: int
    stop: int  # index after its last instruction
    successors: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Loop:
    header: int
    blocks: frozenset[int]
    back_edges: int
    parent: Loop | None = None
    children: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Trip:
    """The blocks of a loop that one turn may execute, and the blocks that it must execute."""

    may: frozenset[int]
    must: frozenset[int]


@dataclass
class Flow:
    function: Function
    blocks: list[Block]
    reachable: frozenset[int]
    loops: list[Loop]  # in program order of their headers
    irreducible: bool  # True if there is a cycle with several entries; such a cycle is not among the loops

    def trip(self, loop: Loop, anchors: frozenset[int]) -> Trip:
        """A turn of the loop that passes all blocks of `anchors`, and therefore not the other side of their branch."""
        edges = {
            b: [s for s in self.blocks[b].successors if s in loop.blocks and s != loop.header] for b in loop.blocks
        }
        latches = {b for b in loop.blocks if loop.header in self.blocks[b].successors}

        def reached(start: int, without: int = -1) -> set[int]:
            seen, pending = {start}, [start]
            while pending:
                following = [s for s in edges[pending.pop()] if s not in seen and s != without]
                seen.update(following)
                pending += following
            return seen

        reach = {b: reached(b) for b in loop.blocks}
        may = frozenset(b for b in loop.blocks if all(a in reach[b] or b in reach[a] for a in anchors))
        ways = [(loop.header, {a}) for a in anchors] + [(a, latches) for a in anchors] or [(loop.header, latches)]
        must = frozenset(b for b in may if any(b == start or not reached(start, b) & goals for start, goals in ways))
        return Trip(may, must)

    def code(self, blocks: frozenset[int]) -> list[Instruction]:
        return [x for b in sorted(blocks) for x in self.function.code[self.blocks[b].start : self.blocks[b].stop]]


def analyse(function: Function) -> Flow:
    blocks = _blocks(function)
    order = _postorder(blocks)
    reachable = frozenset(order)
    dominators = _dominators(blocks, order)
    back: dict[int, list[int]] = {}
    position = {block: i for i, block in enumerate(order)}
    irreducible = False
    for tail in order:
        for head in blocks[tail].successors:
            if dominators[tail] >> head & 1:
                back.setdefault(head, []).append(tail)
            elif position[head] >= position[tail]:
                irreducible = True
    predecessors: dict[int, list[int]] = {block: [] for block in reachable}
    for block in reachable:
        for successor in blocks[block].successors:
            predecessors[successor].append(block)
    loops = []
    for head, tails in sorted(back.items()):
        body = {head}
        pending = list(tails)
        while pending:
            block = pending.pop()
            if block not in body:
                body.add(block)
                pending += predecessors[block]
        loops.append(Loop(head, frozenset(body), len(tails)))
    for loop in loops:
        outer = [other for other in loops if loop.blocks < other.blocks]
        if outer:
            loop.parent = min(outer, key=lambda other: len(other.blocks))
            loop.parent.children.append(loop)
    return Flow(function, blocks, reachable, loops, irreducible)


def _blocks(function: Function) -> list[Block]:
    code = function.code
    leaders = {0} | {index for index in function.labels.values() if index < len(code)}
    for index, instruction in enumerate(code[:-1]):
        if instruction.base in _ENDS | {"BSYNC"} or _jumps(instruction):
            leaders.add(index + 1)
    starts = sorted(leaders)
    blocks = [Block(start, stop) for start, stop in zip(starts, [*starts[1:], len(code)], strict=True)]
    at = {block.start: number for number, block in enumerate(blocks)}
    # Forward data flow: the labels that a BSSY may have put into each barrier register when a block begins.
    states: dict[int, dict[str, frozenset[str]]] = {0: {}}
    pending = [0]
    while pending:
        number = pending.pop()
        block = blocks[number]
        state = dict(states[number])
        for instruction in code[block.start : block.stop]:
            if instruction.base == "BSSY":
                state[_barrier(instruction)] = frozenset(_TARGET.findall(instruction.operands))
        targets = _targets(code[block.stop - 1], state)
        following = {at[function.labels[label]] for label in targets if function.labels.get(label, len(code)) in at}
        if _falls_through(code[block.stop - 1], targets) and number + 1 < len(blocks):
            following.add(number + 1)
        block.successors = sorted(following)
        for successor in following:
            known = states.get(successor)
            merged = {
                key: (known or {}).get(key, frozenset()) | state.get(key, frozenset())
                for key in {*(known or {}), *state}
            }
            if known is None or merged != known:
                states[successor] = merged
                pending.append(successor)
    return blocks


def _jumps(instruction: Instruction) -> bool:
    """True for jumps and for CALL.REL.NOINC to a label, by which the compiler leaves some loops."""
    return instruction.base in _JUMPS or (instruction.base == "CALL" and "`(.L_" in instruction.operands)


def _barrier(instruction: Instruction) -> str:
    """The barrier register of BSSY and BSYNC, with or without modifiers (`BSYNC.RECONVERGENT B0`, `BSYNC B0`)."""
    return re.split(r"[,\s]", instruction.operands)[0]


def _targets(last: Instruction, state: dict[str, frozenset[str]]) -> frozenset[str]:
    if last.predicate == "!PT" or last.opcode.startswith("BRA.DIV"):
        return frozenset()
    if last.base == "BSYNC":
        return state.get(_barrier(last), frozenset())
    if _jumps(last):
        indirect = _INDIRECT_TARGETS.search(last.operands)
        listed = re.split(r"[,\s]+", indirect[1].strip()) if indirect else []
        return frozenset(_TARGET.findall(last.operands) or listed)
    return frozenset()


def _falls_through(last: Instruction, targets: frozenset[str]) -> bool:
    if last.base in _ENDS:
        return last.conditional
    if last.base == "BSYNC":
        return last.conditional or not targets
    if _jumps(last):
        # A second condition stands before the target: `BRA P3, `(.L_x_1)`. Without it, the branch is `BRA `(.L_x_1)`.
        extra = re.match(r"!?(U?P\w+|~?UR\w+|R\d+)\s*,", last.operands)
        if last.opcode.startswith(("BRA.DIV", "BRA.CONV")):
            return last.opcode.startswith("BRA.DIV")
        return last.conditional or (last.base == "BRA" and extra is not None and extra[1] not in ("PT", "UPT"))
    return True


def _postorder(blocks: list[Block]) -> list[int]:
    """Blocks reachable from the entry, in depth-first postorder."""
    order, seen = [], {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        block, successors = stack[-1]
        following = next((s for s in successors if s not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    return order


def _dominators(blocks: list[Block], order: list[int]) -> dict[int, int]:
    """The dominators of every reachable block, as bit masks."""
    everything = sum(1 << block for block in order)
    dominators = dict.fromkeys(order, everything)
    dominators[0] = 1
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in blocks[block].successors:
            predecessors[successor].append(block)
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            if block == 0:
                continue
            common = everything
            for predecessor in predecessors[block]:
                common &= dominators[predecessor]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block] = common
                changed = True
    return dominators
