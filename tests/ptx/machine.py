"""Runs one kernel launch. All threads of a wave of blocks run in parallel; a register is an array over the threads.

Threads at the same basic block execute it together. The group at the earliest block of the text runs first, so that
diverged threads meet again. A block with instructions of a whole warp waits until all lanes of the warp have arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from . import instructions
from .findings import Findings
from .memory import UNSIGNED, GlobalMemory, ParameterMemory, SharedMemory
from .parser import WIDTHS, Block, Immediate, Instruction, Kernel, Operand, Register, Symbol
from .races import Races

_WAVE = 4096  # threads that are emulated at a time
_STEPS = 2_000_000  # a wave that executes more basic blocks is assumed to hang

DTYPES = {"pred": np.dtype(bool), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64)}
for _kind, _letter in (("b", "u"), ("u", "u"), ("s", "i")):
    DTYPES |= {f"{_kind}{8 * n}": np.dtype(f"{_letter}{n}") for n in (1, 2, 4, 8)}
DTYPES |= {"f16": np.dtype(np.uint16), "bf16": np.dtype(np.uint16)}  # stored as bits
DTYPES |= {"f16x2": np.dtype(np.uint32), "bf16x2": np.dtype(np.uint32), "f32x2": np.dtype(np.uint64)}

Operation = Callable[["Active"], None]


class Active:
    """The threads that execute an instruction."""

    def __init__(self, mask: np.ndarray, full: bool | None = None) -> None:
        self.mask = mask
        self.full = bool(mask.all()) if full is None else full

    @cached_property
    def threads(self) -> np.ndarray:
        return np.flatnonzero(self.mask)

    @cached_property
    def warps(self) -> np.ndarray:
        """Warps with at least one active lane."""
        return np.flatnonzero(self.mask.reshape(-1, 32).any(1))

    def narrowed(self, mask: np.ndarray) -> Active:
        return Active(mask if self.full else self.mask & mask)


@dataclass
class Launch:
    """The arguments of a driver's launch call."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # dynamic shared memory in bytes
    parameters: bytes
    memory: GlobalMemory
    findings: Findings
    races: bool = True


def run(launch: Launch) -> int:
    """Emulates the launch. Returns the number of executed instructions, counted per warp and summed over warps."""
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    if threads > launch.kernel.max_threads or threads % 32:
        raise ValueError(f"{launch.kernel.name}: {threads} threads per block, at most {launch.kernel.max_threads}")
    given, taken = len(launch.parameters), launch.kernel.parameter_bytes
    if given != taken:
        raise ValueError(f"{launch.kernel.name}: expected {taken} bytes of parameters, got {given}")
    launch.memory.prepare()
    granule = _granule(launch.kernel, "global")
    global_races = Races((int(launch.memory.places[-1]) >> granule) + 4) if launch.races else None
    wave = max(1, _WAVE // threads)
    executed = 0
    with np.errstate(all="ignore"):
        for first in range(0, blocks, wave):
            machine = Machine(launch, first, min(wave, blocks - first), global_races)
            machine.run()
            executed += machine.executed
    return executed


class Machine:
    """State of the thread blocks of one wave, and their execution."""

    def __init__(self, launch: Launch, first_block: int, blocks: int, global_races: Races | None) -> None:
        self.launch, self.kernel = launch, launch.kernel
        self.block_threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.blocks = blocks
        self.threads = blocks * self.block_threads
        self.warps = self.threads // 32
        self.memory = launch.memory
        self.parameters = ParameterMemory(launch.parameters)
        self.shared = SharedMemory(blocks, self.kernel.static_shared + launch.shared)
        self.registers: dict[str, np.ndarray] = {}
        self.operations: dict[int, list[Operation]] = {}
        self.executed = 0

        self.thread = np.arange(self.threads, dtype=np.int64)
        self.block_of = self.thread // self.block_threads
        self.first_thread = first_block * self.block_threads  # the index of thread 0 in the grid, for the race detector
        self._special(first_block)

        self.alive = np.ones(self.threads, bool)
        self.waiting = np.zeros(self.threads, bool)
        self.resume = np.zeros(self.threads, np.int64)  # the basic block after the barrier
        self.groups: dict[int, np.ndarray] = {0: np.ones(self.threads, bool)}

        self.epoch = self.block_of + first_block << 24  # counts a thread's barriers; differs between blocks
        self.warp_epoch = (self.thread + self.first_thread) // 32 << 24
        self.granules = {space: _granule(self.kernel, space) for space in ("global", "shared")}
        self.shared_races = Races(self.shared.data.size >> self.granules["shared"]) if launch.races else None
        self.global_races = global_races
        self.copies: list = []  # pending asynchronous copies, see instructions.access
        self.committed = np.zeros(self.threads, np.int64)

    def _special(self, first_block: int) -> None:
        in_block = (self.thread % self.block_threads).astype(np.uint32)
        index = (self.block_of + first_block).astype(np.uint32)
        for count, position, size, own in (
            ("%nctaid", "%ctaid", self.launch.grid, index),
            ("%ntid", "%tid", self.launch.block, in_block),
        ):
            below = 1
            for axis, extent in zip("xyz", size, strict=True):
                self.registers[f"{count}.{axis}"] = np.full(self.threads, extent, np.uint32)
                self.registers[f"{position}.{axis}"] = (own // np.uint32(below)) % np.uint32(extent)
                below *= extent
        self.registers["%laneid"] = in_block % np.uint32(32)
        self.source_lane = self.thread % 32
        self.registers["%warpid"] = in_block // np.uint32(32)

    # ---- Operands

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            width = 64 if name == "_" else self.kernel.width_of(name)
            if width == 1:
                self.registers[name] = np.zeros(self.threads, bool)
            else:  # arbitrary bits, since the register is uninitialised
                self.registers[name] = np.full(self.threads, 0xDEADBEEFDEADBEEF % (1 << width), UNSIGNED[width // 8])
        return self.registers[name]

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """An operand's value as type `kind`: a view of its register, or a number."""
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            values = self.register(operand.name)
            if values.dtype == dtype:
                return values
            if values.dtype.itemsize == dtype.itemsize:
                return values.view(dtype)
            if values.dtype.itemsize > dtype.itemsize:
                return values.view(dtype)[:: values.dtype.itemsize // dtype.itemsize]
            raise NotImplementedError(f"{operand.name} is too narrow for {kind}")
        if isinstance(operand, Symbol):
            return dtype.type(self.address_of(operand.name))
        assert isinstance(operand, Immediate), operand
        if kind == "pred":
            return np.bool_(operand.value != 0)
        bits = operand.value % (1 << WIDTHS[kind])
        if dtype.kind == "f" and not operand.is_bits:
            return dtype.type(operand.value)
        return np.array(bits, UNSIGNED[dtype.itemsize]).view(dtype)[()]

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """The register for a result of type `kind`. In a wider register, the result is sign- or zero-extended."""
        assert isinstance(operand, Register), operand
        values = self.register(operand.name)
        dtype = DTYPES[kind]
        if values.dtype == dtype or dtype == np.dtype(bool):
            return values
        if values.dtype.itemsize > dtype.itemsize:
            return values.view(f"{'i' if dtype.kind == 'i' else 'u'}{values.dtype.itemsize}")
        return values.view(dtype)

    def address_of(self, symbol: str) -> int:
        if symbol in self.kernel.shared:
            return self.kernel.shared[symbol]
        for parameter in self.kernel.parameters:
            if parameter.name == symbol:
                return parameter.offset
        raise NotImplementedError(f"address of {symbol}")

    # ---- Reports

    def report(self, kind: str, instruction: Instruction, threads: np.ndarray, detail: str = "") -> None:
        if threads.size == 0:
            return
        thread = int(threads[0]) + self.first_thread
        where = f"block {thread // self.block_threads}, thread {thread % self.block_threads}"
        self.launch.findings.add(kind, self.kernel.name, instruction, f"{where}{detail}", threads.size)

    # ---- Execution

    def run(self) -> None:
        for _ in range(_STEPS):
            if not self.groups:
                if self.copies:
                    self.copies.clear()  # no thread waited for them, so no thread may read them
                if not self.waiting.any():
                    return
                self._give_up_waiting()
            index, mask = self._next_group()
            self._run_block(index, Active(mask))
        raise RuntimeError(f"{self.kernel.name}: still running after {_STEPS} basic blocks")

    def _next_group(self) -> tuple[int, np.ndarray]:
        for index in sorted(self.groups):
            mask = self.groups.pop(index)
            if self.kernel.blocks[index].width == 1 or mask.all():
                return index, mask
            width = self.kernel.blocks[index].width
            lanes = mask.reshape(-1, width)
            whole = ((lanes | ~self.alive.reshape(-1, width)).all(1) & lanes.any(1)).repeat(width) & mask
            if (whole == mask).all():
                return index, mask
            self.groups[index] = mask & ~whole
            if whole.any():
                return index, whole
        index = min(self.groups)
        mask = self.groups.pop(index)
        first = next(i for i in self.kernel.blocks[index].instructions if i.opcode[0] not in ("mov", "add"))
        self.report("diverged warp at instructions of a whole warp", first, np.flatnonzero(mask))
        return index, mask

    def _give_up_waiting(self) -> None:
        instruction = self.kernel.blocks[int(self.resume[self.waiting][0]) - 1].instructions[-1]
        self.report("barrier that not all threads reach", instruction, np.flatnonzero(self.waiting))
        self._release(self.waiting.copy())

    def _run_block(self, index: int, active: Active) -> None:
        block = self.kernel.blocks[index]
        block.reached = True
        if index not in self.operations:
            self.operations[index] = [instructions.build(self, i) for i in _straight(block)]
        for operation in self.operations[index]:
            operation(active)
        self.executed += len(block.instructions) * (self.warps if active.full else active.warps.size)
        self._leave(index, block, active)

    def _leave(self, index: int, block: Block, active: Active) -> None:
        last = block.instructions[-1] if block.instructions else None
        name = last.opcode[0] if last else ""
        if last is None or name not in ("bra", "ret", "exit", "bar", "barrier") or last.opcode[1:2] == ("warp",):
            self._enter(index + 1, active.mask)
            return
        taken, stays = active.mask, None
        if last.guard:
            predicate = self.register(last.guard)
            taken = active.mask & (~predicate if last.negated else predicate)
            stays = active.mask & ~taken
            if stays.any():
                self._enter(index + 1, stays)
            if not taken.any():
                return
        if name == "bra":
            self._enter(self.kernel.labels[last.operands[0].name], taken)
        elif name in ("ret", "exit"):
            self.alive &= ~taken
            self._release_complete()
        else:
            if len(last.operands) > 1:
                raise NotImplementedError(last.text)
            self.waiting |= taken
            self.resume[taken] = index + 1
            self._release_complete()

    def _enter(self, index: int, mask: np.ndarray) -> None:
        if index >= len(self.kernel.blocks):
            self.alive &= ~mask
            self._release_complete()
        elif index in self.groups:
            self.groups[index] = self.groups[index] | mask
        else:
            self.groups[index] = mask

    def _release_complete(self) -> None:
        """Resumes the thread blocks in which every thread has ended or waits at a barrier."""
        if not self.waiting.any():
            return
        complete = (self.waiting | ~self.alive).reshape(self.blocks, -1).all(1)
        self._release(self.waiting & complete.repeat(self.block_threads))

    def _release(self, mask: np.ndarray) -> None:
        if not mask.any():
            return
        self.waiting &= ~mask
        self.epoch[mask] += 1
        self.warp_epoch[mask] += 1
        for index in np.unique(self.resume[mask]):
            self._enter(int(index), mask & (self.resume == index))


def _straight(block: Block) -> list[Instruction]:
    """The instructions of a basic block without a last one that branches, returns or waits."""
    if not block.instructions:
        return []
    last = block.instructions[-1]
    ends = last.opcode[0] in ("bra", "ret", "exit") or (
        last.opcode[0] in ("bar", "barrier") and last.opcode[1] != "warp"
    )
    return block.instructions[:-1] if ends else block.instructions


def _granule(kernel: Kernel, space: str) -> int:
    """log2 of the bytes that the race detector does not tell apart: those of the narrowest store, at most 4."""
    stores = (i.opcode for block in kernel.blocks for i in block.instructions if i.opcode[0] == "st")
    sizes = [WIDTHS.get(opcode[-1], 32) // 8 for opcode in stores if space in opcode]
    return min([4, *sizes]).bit_length() - 1
