"""Costs per pair from counts: unrolling, markers, bounds, occupancy, and contradictions of declarations."""

from dataclasses import replace

import pytest

from benchmarks.static_cost import cost
from benchmarks.static_cost.counts import Counts
from benchmarks.static_cost.machine import MACHINES
from benchmarks.static_cost.sass import Function, Instruction, Resources
from benchmarks.static_cost.variants import Built, SourceLoop, Variant, Work

H100 = MACHINES["sm_90"]
LOOP = SourceLoop("lse", pairs=128, exponentials=256, tensor_macs=4096)


def built(*bodies: list[str], lines=frozenset(), warps=4) -> Built:
    """A kernel with one machine loop per body."""
    function = Function("kernel")
    function.code.append(Instruction("NOP", ""))
    for number, body in enumerate(bodies):
        function.labels[f".L_{number}"] = len(function.code)
        function.code += [Instruction(opcode, "", lines=lines) for opcode in body]
        function.code.append(Instruction("BRA", f"`(.L_{number})", "P0"))
    function.code.append(Instruction("EXIT", ""))
    return Built(function, Resources(32, 0, 0, 0), warps, 0)


def rows(kernel: Built, *loops: SourceLoop) -> list[dict]:
    return cost.rows(Variant("cuda", "kernel", "self", "bfloat16", 16, 8, loops, lambda: kernel), "sm_90")


def test_slots_are_divided_by_the_pairs_of_the_unrolled_trip():
    """The loop is unrolled twice: 4 MUFU.EX2 x 32 lanes x 4 warps are the exponentials of two trips with 256 pairs."""
    (row,) = rows(built(["MUFU.EX2"] * 4 + ["HMMA.1688.F32"] * 2 + ["FFMA"] * 9), replace(LOOP, tensor_macs=4096))
    assert row["unroll"] == 2
    assert row["mufu_per_pair"] == 4 * 128 / 256
    assert row["issue_slots_per_pair"] == (4 + 2 + 9 + 1) * 128 / 256
    assert row["tensor_macs_per_pair"] == 2 * 1024 * 4 / 256
    assert sum(row["breakdown"].values()) == row["issue_slots_per_pair"]
    (alone,) = rows(
        built(["MUFU.EX2"] * 4 + ["HMMA.1688.F32"] * 2 + ["FFMA"] * 9),
        SourceLoop("lse", pairs=32, exponentials=64, tensor_macs=1024, per="warp"),
    )
    assert alone["issue_slots_per_pair"] == row["issue_slots_per_pair"]
    assert alone["clocks_per_pair"] == row["clocks_per_pair"]


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (replace(LOOP, exponentials=384), "512 exponentials, expected a multiple of 384"),
        (replace(LOOP, tensor_macs=8192), "unroll factors disagree"),
        (replace(LOOP, tensor_macs=5000), "8192 tensor multiply-adds, expected a multiple of 5000"),
        (replace(LOOP, exponentials=0, tensor_macs=0), "neither exponentials nor tensor_macs"),
        (replace(LOOP, marker="main"), "one inner loop marked 'main', found 0"),
    ],
)
def test_disagreement_is_an_error(loop, words):
    with pytest.raises(cost.Mismatch, match=words):
        rows(built(["MUFU.EX2"] * 4 + ["HMMA.1688.F32"] * 2), loop)


def test_several_loops_need_markers(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text("\n// static: begin main\nfor\n// static: end main\n")
    bodies = (["MUFU.EX2"], ["MUFU.EX2", "FADD"])
    loop = SourceLoop("lse", pairs=128, exponentials=128)
    with pytest.raises(cost.Mismatch, match="one inner loop without a marker, found 2"):
        rows(built(*bodies), loop)
    kernel = built(*bodies)
    kernel.function.code[3] = replace(kernel.function.code[3], lines=frozenset({(str(source), 3)}))
    (row,) = rows(kernel, replace(loop, marker="main"))
    assert row["issue_slots_per_pair"] == 3  # the second loop has three
    assert len(row["other_loops"]) == 1
    with pytest.raises(cost.Mismatch, match="found 0"):
        rows(kernel, replace(loop, marker="main+masked"))


@pytest.mark.parametrize(
    "text", ["// static: begin a\n", "// static: end a\n", "# static: begin a\n# static: begin a\n"]
)
def test_markers_come_in_pairs(tmp_path, text):
    source = tmp_path / "kernel.py"
    source.write_text(text)
    with pytest.raises(cost.Mismatch, match=r"static: (begin|end) a"):
        rows(built(["MUFU.EX2"], lines=frozenset({(str(source), 1)})), SourceLoop("lse", 128, 128, marker="a"))


def test_exponentials_bound_the_standard_shape():
    """Two exponentials per pair, at 16 per clock and multiprocessor, take 0.63 ms at B = 32 on an H100."""
    counts = Counts(slots=2, exponentials=2)
    counts.classes["mufu"] = 2
    clocks = H100.clocks(counts, wide_tensor=False)
    assert max(clocks, key=lambda unit: clocks[unit]) == "mufu"
    assert clocks["mufu"] / 32 == 2 / 16
    assert H100.milliseconds(clocks["mufu"] / 32, cost.SHAPES["B=32"]) == pytest.approx(0.625, abs=0.005)


def test_units_are_bound_apart():
    counts = Counts(slots=40, exponentials=1, tensor_macs=2048, tensor_work=2048, loads_stores=3, shared_wavefronts=7)
    counts.classes.update(
        {"mufu": 1, "float": 8, "packed float": 2, "multiply": 4, "integer": 6, "compare": 2, "pack": 1}
    )
    assert H100.clocks(counts, wide_tensor=False) == {
        "issue": 40 / 4,
        "mufu": 2,
        "float": (8 + 4 + 4) / 4,
        "multiply": 4 / 2,
        "alu": 8 / 2,
        "pack": 1,
        "load/store": 3,
        "tensor": 2048 / H100.tensor,
        "shared": 7,
        "l2": 0,
    }
    assert H100.clocks(counts, wide_tensor=True)["tensor"] == 1
    assert MACHINES["sm_80"].clocks(counts, wide_tensor=False)["float"] == (8 + 4 + 4) / 2


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        ("sm_90", 4, 32, 0, 16),  # 64 warps
        ("sm_90", 4, 128, 0, 4),  # 65 536 / (128 x 128)
        ("sm_90", 4, 121, 0, 4),  # registers are rounded up to a multiple of 8
        ("sm_90", 8, 255, 0, 1),
        ("sm_90", 1, 16, 0, 32),  # 32 blocks
        ("sm_90", 4, 32, 227 * 1024, 1),
        ("sm_90", 4, 32, 40 * 1024, 5),  # 228 / 41
        ("sm_80", 4, 32, 40 * 1024, 4),  # 164 / 41
        ("sm_120", 4, 32, 0, 12),  # 48 warps
        ("sm_120", 4, 32, 99 * 1024, 1),
        ("sm_120", 4, 32, 100 * 1024, 0),  # does not fit
    ],
)
def test_occupancy(arch, warps, registers, shared, blocks):
    assert MACHINES[arch].resident_blocks(warps, registers, shared) == blocks


def test_phases_of_a_group_add_up():
    (lse,) = rows(built(["MUFU.EX2", "FADD"]), SourceLoop("lse", 128, 128))
    (grad,) = rows(built(["MUFU.EX2", "FADD", "FMUL"]), SourceLoop("grad", 128, 128))
    (total,), wrong = cost.totals([lse, grad])
    assert wrong == []
    assert total["phase"] == "total"
    assert total["phases"] == ["lse", "grad"]
    assert total["mufu_per_pair"] == 2
    assert total["issue_slots_per_pair"] == 3 + 4
    assert total["clocks_per_pair"] == lse["clocks_per_pair"] + grad["clocks_per_pair"]
    found, (wrong,) = cost.totals([lse, lse])
    assert found == []
    assert "('kernel', 'lse')] repeat" in wrong


def test_parts_of_a_phase_add_up_with_their_shares(tmp_path):
    """Half of the pairs take 3 instructions per pair. In the other half, 5 instructions serve two pairs."""
    source = tmp_path / "kernel.cu"
    source.write_text("// static: begin a\n\n// static: end a\n// static: begin b\n\n// static: end b\n")
    kernel = built(["MUFU.EX2", "FADD"], ["MUFU.EX2", "FADD", "FADD", "LDS.64"], warps=1)
    code = kernel.function.code
    for number, instruction in enumerate(code):
        if instruction.opcode == "MUFU.EX2":
            code[number] = replace(instruction, lines=frozenset({(str(source), 2 if number < 3 else 5)}))
    main = SourceLoop("lse", pairs=32, exponentials=32, marker="a", work=lambda s: Work(s**2 / 64, s**2 / 2))
    rest = SourceLoop("lse", 64, 32, marker="b", part="diagonal", work=lambda s: Work(s**2 / 128, s**2 / 2))
    rows_of = cost.rows(Variant("cuda", "kernel", "self", "bfloat16", 16, 8, (main, rest), lambda: kernel), "sm_90")
    (total, *by_length), wrong = cost.totals(rows_of)
    assert wrong == []
    assert total["phases"] == ["lse"]
    assert total["issue_slots_per_pair"] == 3
    assert [row["phase"] for row in by_length] == ["S=128", "S=512", "S=2048"]
    for row in by_length:
        assert row["mufu_per_pair"] == 1 / 2 + 1 / 4
        assert row["issue_slots_per_pair"] == 3 / 2 + 5 / 4
        assert row["shared_wavefronts_per_pair"] == 2 / 128
    with pytest.raises(cost.Mismatch, match=r"phase lse: its loops have 0\.5000 of the pairs at S = 128"):
        rows(kernel, main)


def test_code_in_branches_is_executed_as_often_as_its_exponentials():
    """One block of two is skipped half of the time: 1.5 of 2 exponentials, and 6 of 7 instructions."""
    function = Function("kernel", [Instruction("NOP", "")], {".L_0": 1})
    always = ["MUFU.EX2", "FADD", "FADD"]
    function.code += [Instruction(opcode, "") for opcode in always] + [Instruction("BRA", "`(.L_1)", "P1")]
    function.code += [Instruction("MUFU.EX2", ""), Instruction("FADD", "")]
    function.labels[".L_1"] = len(function.code)
    function.code += [Instruction("BRA", "`(.L_0)", "P0"), Instruction("EXIT", "")]
    kernel = Built(function, Resources(32, 0, 0, 0), 1, 0)
    loop = SourceLoop(
        "lse", pairs=64, exponentials=64, conditional=True, work=lambda s: Work(s**2 / 64, s**2, executed=0.75)
    )
    (row,) = rows(kernel, loop)
    assert row["mufu_per_pair"] == 0.75
    assert row["issue_slots_per_pair"] == (5 + 2 / 2) / 2
    assert row["issue_slots_always_per_pair"] == 5 / 2


def test_loops_inside_take_the_turns_of_their_declared_products():
    """A turn of 32 pairs has 128 multiply-adds: a loop inside has half of them in 4 slots."""
    function = Function("kernel", [Instruction("NOP", "")], {".L_0": 1, ".L_1": 2})
    function.code += [Instruction("MUFU.EX2", ""), Instruction("FFMA", ""), Instruction("FFMA", "")]
    function.code += [Instruction("LDS", ""), Instruction("BRA", "`(.L_1)", "P1")]
    function.code += [Instruction("BRA", "`(.L_0)", "P0"), Instruction("EXIT", "")]
    kernel = Built(function, Resources(32, 0, 0, 0), 1, 0)
    loop = SourceLoop("lse", pairs=32, exponentials=32, looped_macs=128)
    (row,) = rows(kernel, loop)
    assert row["issue_slots_per_pair"] == row["issue_slots_always_per_pair"] == 2 + 2 * 4
    assert row["breakdown"]["float"] == 4
    with pytest.raises(cost.Mismatch, match="64 multiply-adds in loops inside, expected a divisor of 100"):
        rows(kernel, replace(loop, looped_macs=100))


def test_global_bytes_are_at_most_those_of_the_instructions():
    """16 lanes that read the same 4 bytes need 64 bytes of L2: the declaration tells, but cannot exceed 128."""
    loop = SourceLoop("lse", pairs=32, exponentials=32, l2_bytes=64)
    (row,) = rows(built(["MUFU.EX2", "LDG.E"], warps=1), loop)
    assert row["clocks_per_unit"]["l2"] == pytest.approx(2 / H100.l2)
    with pytest.raises(cost.Mismatch, match="expected at most 128 bytes of global memory, 256 are declared"):
        rows(built(["MUFU.EX2", "LDG.E"], warps=1), replace(loop, l2_bytes=256))
