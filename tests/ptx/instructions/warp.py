"""Instructions that the lanes of a warp execute together: shuffles, votes and barriers of a warp."""

from __future__ import annotations

import numpy as np

from .arithmetic import assign


def check_whole(machine, instruction, active) -> None:
    """Reports active lanes if an instruction of the whole warp is executed without all of its lanes."""
    if active.full:
        return
    lanes = active.mask.reshape(-1, 32)
    broken = lanes.any(1) & ~lanes.all(1)
    if broken.any():
        machine.report(
            "part of a warp at an instruction of all", instruction, np.flatnonzero(broken.repeat(32) & active.mask)
        )


def _build_shfl(machine, instruction):
    """shfl with all lanes as members. Every lane reads a lane of its segment, or keeps its own value."""
    mode = instruction.opcode[2]
    result = instruction.operands[0]
    target = machine.target(getattr(result, "first", result), "b32")
    flag = machine.target(result.second, "pred") if hasattr(result, "second") else None
    value = machine.source(instruction.operands[1], "b32")
    by, clamp, members = (machine.source(x, "b32") for x in instruction.operands[2:5])
    lane = machine.source_lane

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        if not np.all(np.broadcast_to(members, machine.threads)[active.mask] == np.uint32(0xFFFFFFFF)):
            raise NotImplementedError(f"{instruction.text}: the mask does not have all lanes")
        shift, control = (np.asarray(x).astype(np.int64) for x in (by, clamp))
        segment = (control >> 8) & 31
        most = (lane & segment) | (control & 31 & ~segment)
        least = lane & segment
        if mode == "up":
            source = lane - (shift & 31)
            inside = source >= most
        elif mode == "down":
            source = lane + (shift & 31)
            inside = source <= most
        elif mode == "bfly":
            source = lane ^ (shift & 31)
            inside = source <= most
        else:
            source = least | (shift & 31 & ~segment)
            inside = source <= most
        source = np.where(inside, source, lane)
        picked = value[machine.thread - lane + source]
        if flag is not None:
            assign(flag, active, inside)
        assign(target, active, picked)

    return operation


def _build_redux(machine, instruction):
    """redux.sync with all lanes as members: every lane receives the sum, modulo 2^32, or the maximum of all lanes."""
    mode, kind = instruction.opcode[2:4]
    if (mode, kind) not in (("add", "s32"), ("add", "u32"), ("max", "s32")):
        raise NotImplementedError(instruction.text)
    target = machine.target(instruction.operands[0], "b32")
    value, members = (machine.source(x, "b32") for x in instruction.operands[1:3])

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        if not np.all(np.broadcast_to(members, machine.threads)[active.mask] == np.uint32(0xFFFFFFFF)):
            raise NotImplementedError(f"{instruction.text}: the mask does not have all lanes")
        lanes = np.broadcast_to(value, machine.threads).reshape(-1, 32)
        result = lanes.view(np.int32).max(1) if mode == "max" else lanes.astype(np.uint64).sum(1)
        assign(target, active, result.astype(np.uint32).repeat(32))

    return operation


def _build_vote(machine, instruction):
    mode = instruction.opcode[2]
    predicate = machine.source(instruction.operands[1], "pred")
    target = machine.target(instruction.operands[0], "b32" if mode == "ballot" else "pred")

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        lanes = (np.broadcast_to(predicate, machine.threads) & active.mask).reshape(-1, 32)
        if mode == "ballot":
            value = (lanes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        elif mode == "all":
            value = (lanes | ~active.mask.reshape(-1, 32)).all(1)
        elif mode == "any":
            value = lanes.any(1)
        else:
            raise NotImplementedError(instruction.text)
        assign(target, active, value.repeat(32))

    return operation


def _build_bar(machine, instruction):
    """bar.warp.sync. Barriers of the thread block end basic blocks; machine.py handles them."""
    if instruction.opcode[1] != "warp":
        raise NotImplementedError(instruction.text)

    def operation(active) -> None:
        check_whole(machine, instruction, active)
        machine.warp_epoch[active.mask] += 1

    return operation


def _build_activemask(machine, instruction):
    target = machine.target(instruction.operands[0], "b32")

    def operation(active) -> None:
        lanes = active.mask.reshape(-1, 32).astype(np.uint64)
        value = (lanes << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        assign(target, active, value.repeat(32))

    return operation


BUILDERS = {
    "shfl": _build_shfl,
    "redux": _build_redux,
    "vote": _build_vote,
    "bar": _build_bar,
    "activemask": _build_activemask,
}
