"""Cost per ordered pair: finds the machine loop of each declared source loop, and divides its counts by its pairs.

Rows of loops count one loop alone. If all loops of a group declare their work for a sequence of S tokens, totals at S
tokens add them up with their shares: whole tiles, the diagonal, the sequence's end, and the loops around them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .counts import Counts, classify, count
from .loops import Flow, Loop, Trip, analyse
from .machine import MACHINES, Machine
from .sass import Instruction, Line
from .variants import Built, SourceLoop, Variant, Work
from .wgmma import early_writes

# Standard shapes: B sequences, A = 48 relation heads, S = 512, three relations in one loss.
SHAPES = {"B=32": 3 * 32 * 48 * 512**2, "B=256": 3 * 256 * 48 * 512**2}
LENGTHS = (128, 512, 2048)  # lengths of the totals with the diagonal
WARP = 32
_SUMS = (  # figures that add up over loops, phases and kernels
    "mufu_per_pair",
    "issue_slots_per_pair",
    "issue_slots_always_per_pair",
    "tensor_per_pair",
    "shared_per_pair",
    "shared_wavefronts_per_pair",
    "global_per_pair",
    "local_per_pair",
)
_NO_PAIRS = dict.fromkeys(_SUMS, 0.0) | {
    "phase": "outside",
    "part": "",
    "breakdown": {},
    "opcodes": {},
    "clocks_per_unit": {},
    "clocks_per_pair": 0.0,
    "bound_ms": dict.fromkeys(SHAPES, 0.0),
    "lengths": {},
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

    With a marker, it is the innermost loop with the marked exponentials; without exponentials, the innermost one with
    all products. If the compiler peeled iterations of a loop,
    the same exponentials are in the enclosing loop as well, which is left out here. If a loop is compiled again for
    another tile size, the one with the declared exponentials is taken.
    """
    exponentials = source.exponentials > 0
    working = inner_loops(flow, exponentials)
    wanted = frozenset(source.marker.split("+")) if source.marker else frozenset()
    if not exponentials:
        # Products may be in loops of their own inside the one that is meant.
        found = _around_all(flow, wanted)
    elif not wanted:
        found = [(loop, flow.trip(loop, frozenset())) for loop in working]
    else:
        found = []
        named = tags(_work(flow, flow.reachable, True))
        for loop in flow.loops:
            own = loop.blocks - frozenset[int]().union(*(child.blocks for child in loop.children))
            marked = {block: tags(_work(flow, [block], True)) for block in own}
            anchors = frozenset(block for block, names in marked.items() if names and names <= wanted)
            trip = flow.trip(loop, anchors)
            # Loops with tags of their own may share instructions with this one, but no exponentials.
            extra = tags(flow.code(trip.may)) - wanted
            alone = extra <= named and not extra & tags(_work(flow, trip.may, True))
            if anchors and alone and wanted <= tags(flow.code(trip.may)):
                found.append((loop, trip))
        inner = [loop for loop, _ in found]
        found = [(loop, trip) for loop, trip in found if not any(other.blocks < loop.blocks for other in inner)]
        if len(found) > source.copies and exponentials:
            lanes = WARP * (warps if source.per == "block" else 1)
            sizes = [count(flow.code(trip.may)).exponentials * lanes for _, trip in found]
            found = [place for place, size in zip(found, sizes, strict=True) if size == source.exponentials]
    if len(found) != source.copies:
        listing = "".join(f"\n  {describe(flow, loop)}" for loop in working) or " none"
        wanted_loops = "one inner loop" if source.copies == 1 else f"{source.copies} inner loops"
        marker = f"marked {source.marker!r}" if source.marker else "without a marker"
        raise Mismatch(
            f"phase {_label(source.phase, source.part)}: expected {wanted_loops} {marker}, found {len(found)}; "
            f"inner loops:{listing}"
        )
    return found


def _around_all(flow: Flow, wanted: frozenset[str]) -> list[tuple[Loop, Trip]]:
    """The innermost loop with products and all of the tags and no others; without tags, with all products in loops."""
    looped = frozenset[int]().union(*(loop.blocks for loop in flow.loops))
    products = frozenset(block for block in looped if _work(flow, [block], False))
    if wanted:
        around = [loop for loop in flow.loops if products & loop.blocks and tags(flow.code(loop.blocks)) == wanted]
    else:
        around = [loop for loop in flow.loops if products and products <= loop.blocks]
    innermost = sorted(around, key=lambda loop: len(loop.blocks))[:1]
    return [(loop, flow.trip(loop, frozenset())) for loop in innermost]


def _label(phase: str, part: str) -> str:
    return f"{phase} {part}".rstrip()


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
    phase = _label(source.phase, source.part)
    scale = warps if source.per == "block" else 1
    factors: dict[str, tuple[int, int]] = {}
    if source.exponentials:
        factors["exponentials"] = (round(counts.exponentials * WARP * scale), source.exponentials)
    if source.tensor_macs and not counts.tensor_unknown:
        factors["tensor multiply-adds"] = (round(counts.tensor_macs * scale), source.tensor_macs)
    if not factors:
        raise Mismatch(f"phase {phase}: neither exponentials nor tensor_macs determine the unroll factor")
    for name, (found, declared) in factors.items():
        if found == 0 or found % declared:
            raise Mismatch(
                f"phase {phase}: the machine loop executes {found:g} {name}, expected a multiple of {declared}"
            )
    ratios = {name: found // declared for name, (found, declared) in factors.items()}
    if len(set(ratios.values())) > 1:
        raise Mismatch(f"phase {phase}: unroll factors disagree: {ratios}")
    return next(iter(ratios.values()))


def rows(variant: Variant, arch: str, lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """One object per loop of the kernel, or one with zeros for a kernel whose work does not grow with the pairs.

    Raises Mismatch if the machine code contradicts the declaration, and Hazard if the machine code is wrong.
    """
    built = variant.build()
    flow = analyse(built.function)
    products, early = early_writes(flow)
    if early:
        raise Hazard("registers are written while wgmma reads them:" + "".join(f"\n  {text}" for text in early))
    machine = MACHINES[arch]
    _check_shares(variant.loops, lengths)
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
    return [common | _loop_figures(flow, places, source, built.warps, machine, lengths) for source, places in found]


def _check_shares(loops: Sequence[SourceLoop], lengths: Sequence[int]) -> None:
    """Raises Mismatch unless the loops of each phase have all pairs of a sequence."""
    shares: dict[tuple[str, int], float] = defaultdict(float)
    for source in loops:
        if source.work is None:
            continue
        for length in lengths:
            if (work := source.work(length)) is None:
                continue
            shares[source.phase, length] += work.pairs / length**2
            if (work.turns == 0) != (work.pairs == 0):
                raise Mismatch(f"phase {_label(source.phase, source.part)}: {work} at S = {length}")
    for (phase, length), share in shares.items():
        if abs(share - 1) > 1e-9:
            raise Mismatch(f"phase {phase}: its loops have {share:.4f} of the pairs at S = {length}, expected all")


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


@dataclass(frozen=True)
class _Turn:
    """The instructions that one turn of a source loop may and must execute."""

    may: Counts
    must: Counts
    turns: int  # turns of the machine loop in one of the source loop
    loop: Loop  # the outermost machine loop of which the turn is a part

    def mean(self, executed: float) -> Counts:
        """Returns what a turn executes on average, if it executes this share of the exponentials.

        Conditional code is executed as often as its exponentials.
        """
        conditional = self.may.exponentials - self.must.exponentials
        share = (executed * self.may.exponentials - self.must.exponentials) / conditional if conditional else executed
        return Counts().plus(self.may, share).plus(self.must, 1 - share)


def _turn(flow: Flow, loop: Loop, trip: Trip, source: SourceLoop, warps: int) -> _Turn:
    """Returns the instructions of one turn of a source loop.

    It has several turns of the machine loop if it contains that loop and the compiler did not unroll it. The
    exponentials determine the number of turns. One path through the enclosing loop is counted with the turns, and
    `unroll` checks the multiply-adds of the sum. If loops inside have products alone, as those over the splits of a
    number or the slices of a row have, their turns are those that the declared multiply-adds require.
    """
    scale = warps if source.per == "block" else 1
    least = flow.trip(loop, frozenset()).must & trip.may if source.conditional else trip.must
    may, must = count(flow.code(trip.may)), count(flow.code(least))
    turns, whole = 1, loop
    executed = may.exponentials * WARP * scale
    if loop.parent and source.tensor_macs and executed < source.exponentials:
        around = flow.trip(loop.parent, frozenset([loop.header]))
        outside = count(flow.code(around.may - loop.blocks))
        needed, remainder = divmod(source.exponentials - outside.exponentials * WARP * scale, executed)
        if needed > 0 and not remainder:
            turns, whole = int(needed), loop.parent
            may = outside.plus(may, turns)
            must = count(flow.code(around.must - loop.blocks)).plus(must, turns)
    missing = source.tensor_macs / scale - may.tensor_macs
    inside = frozenset[int]().union(*(child.blocks for child in loop.children)) & trip.may
    products, more = count(flow.code(inside)), 0.0  # turns of the loops inside, beyond one
    if missing and source.tensor_macs and may.exponentials * WARP * scale == source.exponentials:
        if products.tensor_macs and missing > -turns * products.tensor_macs:
            more = missing / products.tensor_macs
    elif source.looped_macs and (multiplied := _multiply_adds(products) * WARP * scale):
        if source.looped_macs % multiplied:
            found = f"{multiplied:g} multiply-adds in loops inside, expected a divisor of {source.looped_macs}"
            raise Mismatch(f"phase {_label(source.phase, source.part)}: {found}")
        more = source.looped_macs / multiplied - 1
    if more and not products.exponentials:
        may, must = may.plus(products, more), must.plus(count(flow.code(inside & least)), more)
    return _Turn(may, must, turns, whole)


def _multiply_adds(counts: Counts) -> float:
    return counts.opcodes["float", "FFMA"] + 2 * counts.opcodes["packed float", "FFMA2"]


def _enclosing(flow: Flow, loop: Loop) -> _Turn:
    """Returns the code of the enclosing loop, or of the kernel, on the way through a loop, without its loops."""
    if loop.parent is None:
        inside = frozenset(block for inner in inner_loops(flow) for block in inner.blocks)
        everything = count(flow.code(flow.reachable - inside))
        return _Turn(everything, everything, 1, loop)
    around = flow.trip(loop.parent, frozenset([loop.header]))
    inside = frozenset(b for child in loop.parent.children if _work(flow, child.blocks, True) for b in child.blocks)
    return _Turn(count(flow.code(around.may - inside)), count(flow.code(around.must - inside)), 1, loop.parent)


def _loop_figures(
    flow: Flow,
    places: list[tuple[Loop, Trip]],
    source: SourceLoop,
    warps: int,
    machine: Machine,
    lengths: Sequence[int],
) -> dict:
    turns = [_turn(flow, loop, trip, source, warps) for loop, trip in places]
    unrolled = [unroll(turn.may, source, warps) for turn in turns]
    if len(set(unrolled)) > 1:
        raise Mismatch(f"phase {source.phase}: copies of the loop are unrolled differently, {unrolled}")
    scale = warps if source.per == "block" else 1
    wide = any(x.base in ("HGMMA", "QGMMA", "UTCHMMA") for loop, _ in places for x in flow.code(loop.blocks))

    def figures(counts: Counts, always: Counts, pairs: float, l2_bytes: float) -> dict:
        """Figures per pair of instructions that a warp executes."""
        lanes = WARP * scale / pairs
        units = machine.clocks(counts, wide, l2_bytes / scale)
        return {
            "mufu_per_pair": counts.classes["mufu"] * lanes,
            "issue_slots_per_pair": counts.slots * lanes,
            "issue_slots_always_per_pair": always.slots * lanes,
            "tensor_per_pair": counts.classes["tensor"] * lanes,
            "shared_per_pair": counts.classes["shared"] * lanes,
            "shared_wavefronts_per_pair": counts.shared_wavefronts * scale / pairs,
            "global_per_pair": counts.classes["global"] * lanes,
            "local_per_pair": counts.classes["local"] * lanes,
            "clocks_per_unit": {unit: value * scale / pairs for unit, value in units.items()},
        }

    def mean(executed: float) -> tuple[Counts, Counts]:
        """Returns the counts of a turn: those on average, and those of every turn."""
        counts = always = Counts()
        for turn in turns:
            counts = counts.plus(turn.mean(executed), 1 / sum(unrolled))
            always = always.plus(turn.must, 1 / sum(unrolled))
        return counts, always

    def at(length: int, work: Work) -> dict:
        """Figures per pair of a sequence of this length."""
        counts, always = (Counts().plus(counts, work.turns) for counts in mean(work.executed))
        if work.entries:
            around = _enclosing(flow, turns[0].loop)
            counts, always = counts.plus(around.may, work.entries), always.plus(around.must, work.entries)
        share = {"share": work.pairs / length**2}
        return share | figures(counts, always, length**2, source.l2_bytes * work.turns)

    works = {length: source.work(length) for length in (*lengths, 512)} if source.work else {}
    standard = works.get(512)
    counts, always = mean(standard.executed if standard and standard.turns else 1)
    lanes = WARP * scale / source.pairs
    if source.l2_bytes > counts.global_bytes * WARP * scale + 1e-6:
        raise Mismatch(
            f"phase {_label(source.phase, source.part)}: expected at most {counts.global_bytes * WARP * scale:g} bytes "
            f"of global memory, {source.l2_bytes:g} are declared"
        )
    row = figures(counts, always, source.pairs, source.l2_bytes)
    clocks = row["clocks_per_unit"]
    bound_by = max(clocks, key=lambda unit: clocks[unit])
    row |= {
        "phase": source.phase,
        "part": source.part,
        "unroll": unrolled[0],
        "turns": max(turn.turns for turn in turns),
        "tensor_macs_per_pair": counts.tensor_macs * scale / source.pairs,
        "shared_bytes_per_pair": counts.shared_bytes * lanes,
        "global_bytes_per_pair": counts.global_bytes * lanes,
        "breakdown": {name: number * lanes for name, number in counts.classes.most_common()},
        "opcodes": {
            kind: {name: number * lanes for (of, name), number in counts.opcodes.most_common() if of == kind}
            for kind in counts.classes
        },
        "clocks_per_pair": clocks[bound_by],
        "bound_by": bound_by,
        "bound_ms": {shape: machine.milliseconds(clocks[bound_by], number) for shape, number in SHAPES.items()},
        "lengths": {str(length): at(length, work) for length, work in works.items() if work and length in lengths},
        "notes": _notes(flow, [loop for loop, _ in places], max(turn.turns for turn in turns), counts),
    }
    if standard:
        row["share"] = standard.pairs / 512**2
    if source.trips:
        outer = _enclosing(flow, places[0][0]).may.slots
        row["outer_slots_per_pair"] = outer * WARP * scale / (source.pairs * source.trips)
    return row


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
            notes.append(
                f"{len(loop.children)} loops inside, counted as one turn each unless their products are declared"
            )
    if counts.calls:
        notes.append(f"{counts.calls} calls, whose callees are not counted")
    if counts.tensor_unknown:
        notes.append("size of tensor instructions unknown, so they are not in the bound")
    if counts.unknown:
        notes.append(f"opcodes without a class: {', '.join(sorted(counts.unknown))}")
    return notes


def totals(phases: list[dict]) -> tuple[list[dict], list[str]]:
    """Objects with the sums of each group, for loss and gradient together, and the problems of groups.

    The phase "total" adds up the loops over whole tiles. The phases "S=512", ... add up all loops, with their shares,
    if all of them declare their work.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in phases:
        groups[tuple(row[key] for key in ("backend", "group", "arch", "dtype", "d_t", "d_s"))].append(row)
    found, wrong = [], []
    for (backend, group, arch, dtype, d_t, d_s), members in groups.items():
        names = [(row["kernel"], _label(row["phase"], row["part"])) for row in members]
        if len(set(names)) < len(names):
            place = f"{backend} [{group}] {dtype} {d_t}x{d_s} {arch}"
            wrong.append(f"{place}: {names} repeat; alternatives need groups of their own")
            continue
        common = {
            "backend": backend,
            "kernel": "+".join(dict.fromkeys(row["kernel"] for row in members)),
            "group": group,
            "arch": arch,
            "dtype": dtype,
            "d_t": d_t,
            "d_s": d_s,
            **{key: max(row[key] for row in members) for key in ("registers", "spill_bytes", "shared_bytes")},
        }
        machine = MACHINES[arch]
        whole = [row for row in members if not row["part"]]
        clocks = sum(row["clocks_per_pair"] for row in whole)
        found.append(
            common
            | {"phase": "total", "part": ""}
            | {key: sum(row[key] for row in whole) for key in _SUMS}
            | {"phases": [row["phase"] for row in whole], "clocks_per_pair": clocks}
            | {"bound_ms": {name: machine.milliseconds(clocks, number) for name, number in SHAPES.items()}}
        )
        counted = [row for row in members if row["phase"] != "outside"]
        lengths = [row["lengths"].keys() for row in counted]
        for length in lengths[0] if lengths and all(lengths) else ():
            units: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
            for row in counted:
                for unit, value in row["lengths"][length]["clocks_per_unit"].items():
                    units[row["kernel"], row["phase"]][unit] += value
            slowest = [max(clocks, key=lambda unit: clocks[unit]) for clocks in units.values()]
            clocks = sum(max(clocks.values()) for clocks in units.values())
            pairs = {name: number * int(length) / 512 for name, number in SHAPES.items()}  # with as many tokens
            found.append(
                common
                | {"phase": f"S={length}", "part": ""}
                | {key: sum(row["lengths"][length][key] for row in counted) for key in _SUMS}
                | {"phases": [" ".join(names) for names in units], "clocks_per_pair": clocks}
                | {"bound_by": "+".join(dict.fromkeys(slowest))}
                | {"bound_ms": {name: machine.milliseconds(clocks, number) for name, number in pairs.items()}}
            )
    return found, wrong
