"""Loads, stores and asynchronous copies. Every access is checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.memory import PARAMETER_WINDOW, POISON, SHARED_WINDOW
from tests.ptx.parser import WIDTHS, Address, Immediate, Register, Symbol, Vector

from .arithmetic import kind_of

_SPACES = ("global", "shared", "param", "const", "local")


def space_of(instruction) -> str:
    """The address space that an instruction names, or "generic" if it names none."""
    for part in instruction.opcode:
        if part.split("::")[0] in _SPACES:
            return part.split("::")[0]
    return "generic"


def address_source(machine, operand: Address):
    """A function that returns the address of every active thread."""
    offset = np.uint64(operand.offset % (1 << 64))
    if isinstance(operand.base, Symbol):
        shared = operand.base.name in machine.kernel.shared
        value = machine.address_of(operand.base.name) + (0 if shared else PARAMETER_WINDOW)
        base = np.full(machine.threads, value, np.uint64)
    elif isinstance(operand.base, Immediate):
        base = np.full(machine.threads, operand.base.value, np.uint64)
    else:
        assert isinstance(operand.base, Register)
        base = machine.register(operand.base.name)

    def addresses(active) -> np.ndarray:
        some = base if active.full else base[active.threads]
        return some.astype(np.uint64) + offset

    return addresses


def _split(space: str, address: np.ndarray):
    """Yields each space with a mask of the addresses that are in it; None instead of the mask if all are."""
    if space != "generic":
        yield space, None
        return
    shared = address >= np.uint64(SHARED_WINDOW)
    parameter = ~shared & (address >= np.uint64(PARAMETER_WINDOW))
    elsewhere = ~shared & ~parameter
    for name, mask in (("shared", shared), ("param", parameter), ("global", elsewhere)):
        if mask.any():
            yield name, None if mask.all() else mask


@dataclass
class Port:
    """Accesses of one instruction to one kind of memory."""

    machine: object
    instruction: object
    space: str

    def load(self, address: np.ndarray, threads: np.ndarray, size: int, count: int) -> np.ndarray:
        """Returns `count` elements of `size` bytes for each address, (n, count). Wrong addresses yield zeros."""
        out = np.zeros((address.size, count), f"u{size}")
        for space, mask in _split(self.space, address):
            where = np.arange(address.size) if mask is None else np.flatnonzero(mask)
            good, index = self._place(space, address[where], threads[where], size * count, "read")
            where = where[good]
            memory = {"global": self.machine.memory, "shared": self.machine.shared, "param": self.machine.parameters}[
                space
            ]
            elements = (index // size)[:, None] + np.arange(count)
            values = memory.views[size][elements]
            self._check_read(space, values, elements, index, threads[where], size, count)
            out[where] = values
        return out

    def store(self, address: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        size, count = values.dtype.itemsize, values.shape[1]
        for space, mask in _split(self.space, address):
            where = np.arange(address.size) if mask is None else np.flatnonzero(mask)
            good, index = self._place(space, address[where], threads[where], size * count, "write")
            where = where[good]
            self.write(space, index, threads[where], values[where])

    def write(self, space: str, index: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
        """Stores values at places that `_place` has checked."""
        if index.size == 0:
            return
        machine, size, count = self.machine, values.dtype.itemsize, values.shape[1]
        elements = (index // size)[:, None] + np.arange(count)
        memory = machine.memory if space == "global" else machine.shared
        races = machine.global_races if space == "global" else machine.shared_races
        memory.views[size][elements] = values
        if space == "shared":
            memory.marks[size][elements] = np.array(-1).astype(f"u{size}")
            memory.unfenced[elements * size // 2] = True
        if races is None:
            return
        at, who = self._granules(space, index, size * count, threads)
        conflict, twice = races.write(
            at, who + machine.first_thread, machine.epoch[who], machine.warp_epoch[who], machine.block_threads
        )
        if conflict.any():
            machine.report(f"race: {space} memory is written", self.instruction, who[conflict])
        if twice.any():
            self._report_two_values(space, races, at, who, (memory.views[size][elements] != values).any(1), threads)

    def _report_two_values(self, space: str, races, at, who, lost: np.ndarray, threads: np.ndarray) -> None:
        """Reports threads that store different values to one place in one instruction.

        Within a warp this is only a note, because hardware always chooses the same value.
        """
        machine = self.machine
        last = races.writer[at]
        across = (last // 32 != (who + machine.first_thread) // 32).reshape(threads.size, -1).any(1)
        machine.report(f"race: {space} memory gets two values at once", self.instruction, threads[lost & across])
        machine.report(
            f"note: lanes of a warp store different values to one place of {space} memory",
            self.instruction,
            threads[lost & ~across],
        )

    def _granules(self, space: str, first: np.ndarray, size: int, threads: np.ndarray):
        """The granules of accesses of `size` bytes from `first` on, for the race detector, and the thread of each."""
        machine = self.machine
        shift = machine.granules[space]
        if space == "global":
            first = machine.memory.side_by_side(first)
        count = max(1, size >> shift)
        at = (first >> shift)[:, None] + np.arange(count)
        return at.ravel(), threads if count == 1 else threads.repeat(count)

    def _place(self, space: str, address: np.ndarray, threads: np.ndarray, size: int, verb: str):
        """Returns a mask of the correct addresses, and their places in the memory's array. Reports all others."""
        machine = self.machine
        aligned = address % np.uint64(size) == 0
        if not aligned.all():
            bad = ~aligned
            machine.report(
                f"misaligned {verb} of {size} bytes",
                self.instruction,
                threads[bad],
                f", address {int(address[bad][0]):#x}",
            )
        if space == "global":
            inside = machine.memory.inside(address, size)
            if not inside.all():
                first = int(address[~inside][0])
                where = machine.memory.name_of(first)
                machine.report(
                    f"out-of-bounds {verb} of {size} bytes", self.instruction, threads[~inside], f", {where}"
                )
            good = aligned & inside
            return good, machine.memory.index(address[good])
        if space == "shared":
            offset = np.where(address >= np.uint64(SHARED_WINDOW), address - np.uint64(SHARED_WINDOW), address)
            offset = offset.astype(np.int64)
            inside = (offset >= 0) & (offset + size <= machine.shared.size)
            where = f" of {machine.shared.size} shared bytes"
            index = machine.block_of[threads] * machine.shared.stride + offset
        elif space == "param":
            offset = np.where(address >= np.uint64(PARAMETER_WINDOW), address - np.uint64(PARAMETER_WINDOW), address)
            offset = offset.astype(np.int64)
            inside = (offset >= 0) & (offset + size <= machine.parameters.size)
            where = f" of {machine.parameters.size} bytes of parameters"
            index = offset
        else:
            raise NotImplementedError(self.instruction.text)
        if not inside.all():
            first = int(offset[~inside][0])
            machine.report(
                f"out-of-bounds {verb} of {size} bytes", self.instruction, threads[~inside], f", byte {first}{where}"
            )
        good = aligned & inside
        return good, index[good]

    def _check_read(self, space: str, values, elements, index, threads, size: int, count: int) -> None:
        machine = self.machine
        if space == "param" or threads.size == 0:
            return
        if space == "shared":
            fresh = (machine.shared.marks[size][elements] != np.array(-1).astype(f"u{size}")).any(1)
        elif size >= 4:
            fresh = (values.view(np.uint32) == POISON).any(1)
        else:
            fresh = np.zeros(1, bool)
        if fresh.any():
            machine.report(f"uninitialised {space} memory is read", self.instruction, threads[fresh])
        races = machine.global_races if space == "global" else machine.shared_races
        if races is not None:
            at, who = self._granules(space, index, size * count, threads)
            conflict = races.read(
                at, who + machine.first_thread, machine.epoch[who], machine.warp_epoch[who], machine.block_threads
            )
            if conflict.any():
                machine.report(f"race: {space} memory is read", self.instruction, who[conflict])


def _build_ld(machine, instruction):
    kind = kind_of(instruction)
    size = WIDTHS[kind] // 8
    to, where = instruction.operands
    items = to.items if isinstance(to, Vector) else (to,)
    signed = f"{'i' if kind[0] == 's' else 'u'}{size}"
    targets = [machine.target(item, kind if kind[0] == "s" else f"b{WIDTHS[kind]}") for item in items]
    addresses = address_source(machine, where)
    port = Port(machine, instruction, space_of(instruction))

    def operation(active) -> None:
        threads = machine.thread if active.full else active.threads
        values = port.load(addresses(active), threads, size, len(items)).view(signed)
        for k, target in enumerate(targets):
            if active.full:
                target[...] = values[:, k]
            else:
                target[threads] = values[:, k]

    return operation


def _build_st(machine, instruction):
    kind = kind_of(instruction)
    size = WIDTHS[kind] // 8
    where, what = instruction.operands
    items = what.items if isinstance(what, Vector) else (what,)
    sources = [machine.source(item, f"b{WIDTHS[kind]}") for item in items]
    addresses = address_source(machine, where)
    port = Port(machine, instruction, space_of(instruction))

    def operation(active) -> None:
        threads = machine.thread if active.full else active.threads
        values = np.empty((threads.size, len(items)), f"u{size}")
        for k, source in enumerate(sources):
            values[:, k] = source[threads] if np.ndim(source) else source
        port.store(addresses(active), threads, values)

    return operation


def _build_red(machine, instruction):
    """red.global.add.f32. It is a race if another thread accesses the place: the order of additions must be fixed."""
    opcode = instruction.opcode
    if opcode[1:5] != ("global", "gpu", "relaxed", "add") or opcode[-1] != "f32":
        raise NotImplementedError(instruction.text)
    where, what = instruction.operands
    items = what.items if isinstance(what, Vector) else (what,)
    sources = [machine.source(item, "f32") for item in items]
    addresses = address_source(machine, where)
    port = Port(machine, instruction, "global")

    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    def operation(active) -> None:
        threads = machine.thread if active.full else active.threads
        at = addresses(active)
        values = np.stack(
            [source[threads] if np.ndim(source) else np.full(threads.size, source) for source in sources], 1
        )
        before = port.load(at, threads, 4, len(items)).view(np.float32)
        port.store(at, threads, flush(flush(before) + flush(values)).view(np.uint32))

    return operation


@dataclass
class _Copy:
    """A cp.async before its wait: the values that it read, and the places that get them at the wait."""

    port: Port
    threads: np.ndarray
    group: np.ndarray  # group of each thread
    index: np.ndarray
    values: np.ndarray


def _build_cp(machine, instruction):
    if instruction.opcode[1] != "async":
        raise NotImplementedError(instruction.text)
    if instruction.opcode[2] == "commit_group":
        return lambda active: np.add(machine.committed, 1, out=machine.committed, where=active.mask)
    if instruction.opcode[2] in ("wait_group", "wait_all"):
        pending = instruction.operands[0].value if instruction.operands else -1
        return lambda active: _arrive(machine, active, pending)
    if instruction.opcode[2] not in ("ca", "cg"):
        raise NotImplementedError(instruction.text)
    to, where, size = instruction.operands[:3]
    size = size.value
    targets, sources = address_source(machine, to), address_source(machine, where)
    given = machine.source(instruction.operands[3], "u32") if len(instruction.operands) > 3 else np.uint32(size)
    reads, writes = Port(machine, instruction, "global"), Port(machine, instruction, "shared")

    def operation(active) -> None:
        threads = machine.thread if active.full else active.threads
        real = np.broadcast_to(given, machine.threads)[threads]
        if not np.isin(real, (0, size)).all():
            raise NotImplementedError(f"{instruction.text}: copies of fewer bytes than the size")
        values = np.zeros((threads.size, size // 4), np.uint32)
        here = real == size
        if here.any():
            values[here] = reads.load(sources(active)[here], threads[here], 4, size // 4)
        good, index = writes._place("shared", targets(active), threads, size, "write")
        machine.copies.append(
            _Copy(writes, threads[good], machine.committed[threads[good]].copy(), index, values[good])
        )

    return operation


def _arrive(machine, active, pending: int) -> None:
    """Completes the copies of all groups but the last `pending` ones. -1 also completes uncommitted copies."""
    left = []
    for copy in machine.copies:
        here = active.mask[copy.threads]
        if pending >= 0:
            here = here & (copy.group < machine.committed[copy.threads] - pending)
        if here.any():
            copy.port.write("shared", copy.index[here], copy.threads[here], copy.values[here])
        if not here.all():
            left.append(_Copy(copy.port, copy.threads[~here], copy.group[~here], copy.index[~here], copy.values[~here]))
    machine.copies = left


def _build_fence(machine, instruction):
    """Only fence.proxy.async has an effect. The emulator executes loads and stores in order without fences."""
    if instruction.opcode[:3] != ("fence", "proxy", "async"):
        return lambda active: None

    def operation(active) -> None:
        blocks = np.unique(machine.block_of[active.mask])
        machine.shared.unfenced.reshape(machine.blocks, -1)[blocks] = False

    return operation


BUILDERS = {
    "ld": _build_ld,
    "st": _build_st,
    "red": _build_red,
    "cp": _build_cp,
    "membar": _build_fence,
    "fence": _build_fence,
}
