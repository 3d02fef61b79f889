"""Cost per ordered pair: finds the machine loop of each declared source loop, and divides its counts by its pairs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from .counts import Counts, classify, count
from .loops import Flow, Loop, Trip, analyse
from .machine import MACHINES, Machine
from .sass import Instruction, Line
from .variants import Built, SourceLoop, Variant
from .wgmma import early_writes

# Standard shapes: B sequences, A = 48 relation heads, S = 512, three relations in one loss.
SHAPES = {"B=32": 3 * 32 * 48 * 512**2, "B=256": 3 * 256 * 48 * 512**2}
WARP = 32
_NO_PAIRS = {
    "phase": "outside",
    "mufu_per_pair": 0.0,
    "issue_slots_per_pair": 0.0,
    "issue_slots_always_per_pair": 0.0,
    "tensor_per_pair": 0.0,
    "shared_per_pair": 0.0,
    "global_per_pair": 0.0,
    "breakdown": {},
    "opcodes": {},
    "clocks_per_unit": {},
    "clocks_per_pair": 0.0,
    "bound_ms": dict.fromkeys(SHAPES, 0.0),
}
_MARKER = re.compile(r"(?:#|//)\s*static: (begin|end) (\S+)")


class Mismatch(ValueError):
    """The machine code contradicts the declaration."""


class Hazard(ValueError):
    """The compiler's machine code breaks a rule of the hardware."""


@cache
def _regions(path: str) -> tuple[tuple[str, int, int], ...]:
    """(tag, first line, last line) of a source file's markers."""
    file = Path(path)
    if not file.exists():
        return ()
    regions: list[tuple[str, int, int]] = []
    begun: dict[str, int] = {}
    for number, text in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if match := _MARKER.search(text):
            kind, tag = match.groups()
            if (kind == "begin") == (tag in begun):
                raise Mismatch(f"{path}:{number}: 'static: {kind} {tag}' without its counterpart")
            if kind == "begin":
                begun[tag] = number
            else:
                regions.append((tag, begun.pop(tag), number))
    if begun:
        raise Mismatch(f"{path}: 'static: begin {', '.join(begun)}' is never ended")
    return tuple(regions)


@cache
def _tags(lines: frozenset[Line]) -> frozenset[str]:
    return frozenset(tag for path, line in lines for tag, first, last in _regions(path) if first <= line <= last)


def tags(code: Iterable[Instruction]) -> frozenset[str]:
    """Names of the marked source regions that contain the source of at least one of the instructions."""
    return frozenset(tag for instruction in code for tag in _tags(instruction.lines))


def _work(flow: Flow, blocks: Iterable[int], exponentials: bool) -> list[Instruction]:
    """The exponentials of the blocks, or their tensor instructions."""
    code = flow.code(frozenset(blocks))
    return [x for x in code if (x.opcode.startswith("MUFU.EX2") if exponentials else classify(x) == "tensor")]


def inner_loops(flow: Flow, exponentials: bool = True) -> list[Loop]:
    """Innermost loops with exponentials, or with tensor instructions. Loops without these may be inside them."""
    working = [loop for loop in flow.loops if _work(flow, loop.blocks, exponentials)]
    return [loop for loop in working if not any(child in working for child in loop.children)]


def find(flow: Flow, source: SourceLoop, warps: int) -> list[tuple[Loop, Trip]]:
    """The machine loop of a source loop, or its `copies`, with the path through it that the marker selects.

    A loop that is compiled again for another tile size is left out: its exponentials are not those that are declared.
    """
    found = []
    exponentials = source.exponentials > 0
    for loop in inner_loops(flow, exponentials):
        if not source.marker:
            found.append((loop, flow.trip(loop, frozenset())))
            continue
        wanted = frozenset(source.marker.split("+"))
        marked = {block: tags(_work(flow, [block], exponentials)) for block in loop.blocks}
        anchors = frozenset(block for block, names in marked.items() if names and names <= wanted)
        trip = flow.trip(loop, anchors)
        if anchors and tags(flow.code(trip.may)) == wanted:
            found.append((loop, trip))
    if len(found) > source.copies and exponentials:
        lanes = WARP * (warps if source.per == "block" else 1)
        found = [
            (loop, trip)
            for loop, trip in found
            if count(flow.code(trip.may)).exponentials * lanes % source.exponentials == 0
        ]
    if len(found) != source.copies:
        listing = "".join(f"\n  {describe(flow, loop)}" for loop in inner_loops(flow, exponentials)) or " none"
        wanted_loops = "one inner loop" if source.copies == 1 else f"{source.copies} inner loops"
        marker = f"marked {source.marker!r}" if source.marker else "without a marker"
        raise Mismatch(
            f"phase {source.phase}: expected {wanted_loops} {marker}, found {len(found)}; inner loops:{listing}"
        )
    return found


def describe(flow: Flow, loop: Loop) -> str:
    code = flow.code(loop.blocks)
    counts = count(code)
    lines = sorted(line for instruction in code for _, line in instruction.lines)
    where = f"lines {lines[0]}-{lines[-1]}" if lines else "no line table"
    return (
        f"{counts.slots} instructions, {counts.exponentials} MUFU.EX2, {counts.classes['tensor']} tensor, "
        f"tags {sorted(tags(code))}, {where}"
    )


def unroll(counts: Counts, source: SourceLoop, warps: int) -> int:
    """Number of source trips in one trip of the machine loop, from the declared work of a source trip.

    Raises Mismatch if the counts are not multiples of the declared work.
    """
    scale = warps if source.per == "block" else 1
    factors = {}
    if source.exponentials:
        factors["exponentials"] = (counts.exponentials * WARP * scale, source.exponentials)
    if source.tensor_macs and not counts.tensor_unknown:
        factors["tensor multiply-adds"] = (counts.tensor_macs * scale, source.tensor_macs)
    if not factors:
        raise Mismatch(f"phase {source.phase}: neither exponentials nor tensor_macs determine the unroll factor")
    for name, (found, declared) in factors.items():
        if found == 0 or found % declared:
            raise Mismatch(
                f"phase {source.phase}: the machine loop executes {found} {name}, expected a multiple of {declared}"
            )
    ratios = {name: found // declared for name, (found, declared) in factors.items()}
    if len(set(ratios.values())) > 1:
        raise Mismatch(f"phase {source.phase}: unroll factors disagree: {ratios}")
    return next(iter(ratios.values()))


def rows(variant: Variant, arch: str) -> list[dict]:
    """One object per phase of the kernel, or one with zeros for a kernel whose work does not grow with the pairs.

    Raises Mismatch if the machine code contradicts the declaration, and Hazard if the machine code is wrong.
    """
    built = variant.build()
    flow = analyse(built.function)
    products, early = early_writes(flow)
    if early:
        raise Hazard("registers are written while wgmma reads them:" + "".join(f"\n  {text}" for text in early))
    machine = MACHINES[arch]
    found = [(source, find(flow, source, built.warps)) for source in variant.loops]
    common = {
        "backend": variant.backend,
        "kernel": variant.kernel,
        "group": variant.group,
        "arch": arch,
        "dtype": variant.dtype,
        "d_t": variant.d_t,
        "d_s": variant.d_s,
        **_kernel_figures(built, machine),
        "wgmma_products": products,
    }
    declared = [loop for _, places in found for loop, _ in places]
    others = [loop for loop in inner_loops(flow) if loop not in declared]
    common["other_loops"] = [describe(flow, loop) for loop in others]
    if not found:
        return [common | _NO_PAIRS]
    return [common | _loop_figures(flow, places, source, built.warps, machine) for source, places in found]


def _kernel_figures(built: Built, machine: Machine) -> dict:
    usage = built.resources
    spilled = count(built.function.code).local_bytes
    blocks = machine.resident_blocks(built.warps, usage.registers, built.shared_bytes)
    return {
        "registers": usage.registers,
        "spill_bytes": spilled,  # all LDL and STL in the code of a thread, each counted once
        "local_bytes": usage.stack + usage.local,
        "shared_bytes": built.shared_bytes,
        "warps": built.warps,
        "blocks_per_sm": blocks,
        "warps_per_sm": blocks * built.warps,
    }


def _source_trip(
    flow: Flow, loop: Loop, trip: Trip, source: SourceLoop, warps: int
) -> tuple[list[Instruction], list[Instruction], int]:
    """The instructions that a source trip may and must execute, and its number of turns of the machine loop.

    A source trip has several turns if it contains the loop and the compiler did not unroll it. The exponentials
    determine the number of turns. One path through the enclosing loop is counted with the turns, and `unroll` checks
    the multiply-adds of the sum.
    """
    may, must = flow.code(trip.may), flow.code(trip.must)
    lanes = WARP * (warps if source.per == "block" else 1)
    executed = count(may).exponentials * lanes
    if loop.parent and source.tensor_macs and executed < source.exponentials:
        around = flow.trip(loop.parent, frozenset([loop.header]))
        outside = flow.code(around.may - loop.blocks)
        turns, remainder = divmod(source.exponentials - count(outside).exponentials * lanes, executed)
        if turns > 0 and not remainder:
            return turns * may + outside, turns * must + flow.code(around.must - loop.blocks), turns
    return may, must, 1


def _loop_figures(
    flow: Flow, places: list[tuple[Loop, Trip]], source: SourceLoop, warps: int, machine: Machine
) -> dict:
    trips = [_source_trip(flow, loop, trip, source, warps) for loop, trip in places]
    unrolled = [unroll(count(may), source, warps) for may, _, _ in trips]
    if len(set(unrolled)) > 1:
        raise Mismatch(f"phase {source.phase}: copies of the loop are unrolled differently, {unrolled}")
    code = [instruction for may, _, _ in trips for instruction in may]
    turns = max(turns for _, _, turns in trips)
    counts = count(code)
    always = count(instruction for _, must, _ in trips for instruction in must)
    scale = warps if source.per == "block" else 1
    pairs = source.pairs * sum(unrolled)  # pairs of one trip of each machine loop
    lanes = WARP * scale / pairs  # lane slots per pair for each warp instruction of the loops
    wide = any(instruction.base in ("HGMMA", "QGMMA", "UTCHMMA") for instruction in code)
    clocks = {unit: value * scale / pairs for unit, value in machine.clocks(counts, wide).items()}
    bound_by = max(clocks, key=lambda unit: clocks[unit])
    figures = {
        "phase": source.phase,
        "unroll": unrolled[0],
        "turns": turns,
        "mufu_per_pair": counts.classes["mufu"] * lanes,
        "issue_slots_per_pair": counts.slots * lanes,
        "issue_slots_always_per_pair": always.slots * lanes,
        "tensor_per_pair": counts.classes["tensor"] * lanes,
        "tensor_macs_per_pair": counts.tensor_macs * scale / pairs,
        "shared_per_pair": counts.classes["shared"] * lanes,
        "shared_bytes_per_pair": counts.shared_bytes * lanes,
        "global_per_pair": counts.classes["global"] * lanes,
        "global_bytes_per_pair": counts.global_bytes * lanes,
        "local_per_pair": counts.classes["local"] * lanes,
        "breakdown": {name: number * lanes for name, number in counts.classes.most_common()},
        "opcodes": {
            kind: {name: number * lanes for (of, name), number in counts.opcodes.most_common() if of == kind}
            for kind in counts.classes
        },
        "clocks_per_unit": clocks,
        "clocks_per_pair": clocks[bound_by],
        "bound_by": bound_by,
        "bound_ms": {shape: machine.milliseconds(clocks[bound_by], number) for shape, number in SHAPES.items()},
        "notes": _notes(flow, [loop for loop, _ in places], turns, counts),
    }
    if source.trips:
        loop = places[0][0]
        around = flow.trip(loop.parent, frozenset([loop.header])).may if loop.parent else flow.reachable
        inside = frozenset(block for inner in inner_loops(flow) for block in inner.blocks)
        outer = count(flow.code(around - inside)).slots
        figures["outer_slots_per_pair"] = outer * WARP * scale / (source.pairs * source.trips)
    return figures


def _notes(flow: Flow, loops: list[Loop], turns: int, counts: Counts) -> list[str]:
    notes = []
    if flow.irreducible:
        notes.append("the kernel has a cycle with several entries")
    if len(loops) > 1:
        notes.append(f"mean of {len(loops)} machine loops")
    if turns > 1:
        notes.append(f"{turns} turns of the inner loop, and one path through the enclosing loop")
    for loop in loops:
        if loop.back_edges > 1:
            notes.append(f"{loop.back_edges} back edges, counted as one loop")
        if loop.children:
            notes.append(f"{len(loop.children)} loops inside, counted as one turn each")
    if counts.calls:
        notes.append(f"{counts.calls} calls, whose callees are not counted")
    if counts.tensor_unknown:
        notes.append("size of tensor instructions unknown, so they are not in the bound")
    if counts.unknown:
        notes.append(f"opcodes without a class: {', '.join(sorted(counts.unknown))}")
    return notes


def totals(phases: list[dict]) -> tuple[list[dict], list[str]]:
    """One object with phase "total" per group, for loss and gradient together, and the problems of groups."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in phases:
        groups[tuple(row[key] for key in ("backend", "group", "arch", "dtype", "d_t", "d_s"))].append(row)
    found, wrong = [], []
    for (backend, group, arch, dtype, d_t, d_s), members in groups.items():
        names = [(row["kernel"], row["phase"]) for row in members]
        if len(set(names)) < len(names):
            place = f"{backend} [{group}] {dtype} {d_t}x{d_s} {arch}"
            wrong.append(f"{place}: {names} repeat; alternatives need groups of their own")
            continue
        clocks = sum(row["clocks_per_pair"] for row in members)
        shared = {"backend": backend, "kernel": "+".join(dict.fromkeys(row["kernel"] for row in members))}
        sums = ("mufu_per_pair", "issue_slots_per_pair", "issue_slots_always_per_pair", "tensor_per_pair")
        found.append(
            shared
            | {"group": group, "phase": "total", "arch": arch, "dtype": dtype, "d_t": d_t, "d_s": d_s}
            | {key: sum(row[key] for row in members) for key in (*sums, "shared_per_pair", "global_per_pair")}
            | {key: max(row[key] for row in members) for key in ("registers", "spill_bytes", "shared_bytes")}
            | {"phases": [row["phase"] for row in members], "clocks_per_pair": clocks}
            | {"bound_ms": {name: MACHINES[arch].milliseconds(clocks, number) for name, number in SHAPES.items()}}
        )
    return found, wrong
