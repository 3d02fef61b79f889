"""The semantics of PTX instructions. `build` returns a function that executes an instruction for the active threads."""

from __future__ import annotations

from tests.ptx.parser import Instruction

from . import access, arithmetic, convert, mma, warp, wgmma

_BUILDERS = {
    **arithmetic.BUILDERS,
    **convert.BUILDERS,
    **access.BUILDERS,
    **warp.BUILDERS,
    **mma.BUILDERS,
    **wgmma.BUILDERS,
}


def build(machine, instruction: Instruction):
    builder = _BUILDERS.get(instruction.opcode[0])
    if builder is None:
        raise NotImplementedError(f"PTX line {instruction.line}: {instruction.text}")
    operation = builder(machine, instruction)
    if instruction.guard is None:
        return operation
    predicate, negated = machine.register(instruction.guard), instruction.negated

    def guarded(active) -> None:
        some = active.narrowed(~predicate if negated else predicate)
        if some.mask.any():
            operation(some)

    return guarded
