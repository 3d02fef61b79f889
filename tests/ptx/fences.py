"""Checks that every wgmma of a PTX text sees the stores to shared memory before it.

wgmma reads shared memory through the async proxy. Ordinary stores, and the data of cp.async after its wait, become
visible to that proxy only by fence.proxy.async. In the emulator stores are always visible, so a missing fence does not
change any value. The order of the instructions shows it.
"""

from __future__ import annotations

from .parser import Block, Instruction, Kernel


def unfenced(kernel: Kernel) -> list[str]:
    """Returns each wgmma.mma_async that some path through the kernel reaches with unfenced stores or copies.

    The check assumes that the product reads these stores: the kernels store nothing else between fence and product.
    """
    stale: dict[int, bool] = {0: False}
    pending = [0]
    while pending:
        index = pending.pop()
        state, _ = _through(kernel.blocks[index], stale[index])
        for successor in _successors(kernel, index):
            merged = stale.get(successor, False) or state
            if stale.get(successor) != merged:
                stale[successor] = merged
                pending.append(successor)
    return [text for index in sorted(stale) for text in _through(kernel.blocks[index], stale[index])[1]]


def _through(block: Block, stale: bool) -> tuple[bool, list[str]]:
    found = []
    for instruction in block.instructions:
        opcode = instruction.opcode
        stores = opcode[0] in ("st", "stmatrix") and any(part.startswith("shared") for part in opcode)
        arrives = opcode[:2] == ("cp", "async") and opcode[2] in ("wait_group", "wait_all")
        if stores or arrives:
            stale = True
        elif opcode[:2] == ("fence", "proxy") and opcode[2].startswith("async"):
            stale = False
        elif stale and opcode[:2] == ("wgmma", "mma_async"):
            found.append(f"line {instruction.line}: {instruction.text}")
    return stale, found


def _successors(kernel: Kernel, index: int) -> list[int]:
    block = kernel.blocks[index]
    last: Instruction | None = block.instructions[-1] if block.instructions else None
    name = last.opcode[0] if last else ""
    following = [index + 1] if index + 1 < len(kernel.blocks) else []
    if last is None or name not in ("bra", "ret", "exit"):
        return following
    taken = [kernel.labels[last.operands[0].name]] if name == "bra" else []
    return taken + following if last.guard else taken
