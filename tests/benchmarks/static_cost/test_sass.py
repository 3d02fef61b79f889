"""Parsing of machine code, control flow, loops and classes of instructions, on listings that can be counted by hand."""

import textwrap

import pytest

from benchmarks.static_cost.counts import access_bytes, classify, count, tensor_macs
from benchmarks.static_cost.loops import Trip, analyse
from benchmarks.static_cost.sass import Instruction, demangle, parse, parse_resources
from benchmarks.static_cost.wgmma import early_writes

HEADER = '\t.section\t.text.kernel,"ax",@progbits\n.text.kernel:\n'


def flow_of(listing: str):
    """Control flow of lines such as `@P0 BRA `(.L_x_1)` and of labels on lines of their own."""
    rows = []
    for number, row in enumerate(textwrap.dedent(listing).strip().splitlines()):
        rows.append(row if row.endswith(":") else f"        /*{16 * number:04x}*/    {row.strip()} ;")
    return analyse(parse(HEADER + "\n".join(rows))["kernel"])


def opcodes(flow, loop):
    return [instruction.opcode for instruction in flow.code(loop.blocks)]


def opcodes_of(flow, block):
    return [instruction.opcode for instruction in flow.code(frozenset([block]))]


def test_parse_keeps_predicates_labels_and_inlined_lines():
    listing = HEADER + textwrap.dedent("""
        \t//## File "/a.cu", line 2 inlined at "/a.cu", line 5
        \t//## File "/a.cu", line 5 inlined at "/b.cu", line 12
        \t//## File "/b.cu", line 12
                /*0000*/              @!UP1 MUFU.EX2 R9, R9 ;
                /*0010*/                   FADD R1, R1, R9 ;
        .L_x_1:
        \t//## File "/b.cu", line 13
                /*0020*/                   BRX R2 -0x20 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) ;
        .L_x_2:
                /*0030*/                   EXIT ;
    """)
    function = parse(listing)["kernel"]
    assert [x.opcode for x in function.code] == ["MUFU.EX2", "FADD", "BRX", "EXIT"]
    assert function.code[0].predicate == "!UP1"
    assert function.code[0].lines == {("/a.cu", 2), ("/a.cu", 5), ("/b.cu", 12)}
    assert function.code[1].lines == function.code[0].lines
    assert function.code[3].lines == {("/b.cu", 13)}
    assert function.labels == {".text.kernel": 0, ".L_x_1": 2, ".L_x_2": 3}


def test_two_functions_are_kept_apart():
    listing = (
        HEADER + "  /*0000*/ EXIT ;\n" + HEADER.replace("kernel", "other") + "  /*0000*/ NOP ;\n  /*0010*/ EXIT ;\n"
    )
    assert {name: len(function.code) for name, function in parse(listing).items()} == {"kernel": 1, "other": 2}


def test_resources_and_names():
    text = """
    Resource usage:
     Common:
      GLOBAL:11 CONSTANT[4]:8
     Function _Z3toyILi128EEvPf:
      REG:62 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
    """
    usage = parse_resources(text)["_Z3toyILi128EEvPf"]
    assert (usage.registers, usage.stack, usage.shared, usage.local) == (62, 16, 1024, 8)
    assert demangle(["_Z3toyILi128EEvPf"])["_Z3toyILi128EEvPf"] == "void toy<128>(float*)"


def test_loop_after_a_straight_line():
    flow = flow_of("""
        MOV R1, RZ
        .L_x_0:
        MUFU.EX2 R2, R1
        ISETP.NE.AND P0, PT, R1, RZ, PT
        @P0 BRA `(.L_x_0)
        STG.E [R4.64], R2
        EXIT
        .L_x_1:
        BRA `(.L_x_1)
        NOP
    """)
    (loop,) = flow.loops  # the trap after EXIT cannot be reached and is not a loop
    assert opcodes(flow, loop) == ["MUFU.EX2", "ISETP.NE.AND", "BRA"]
    assert flow.trip(loop, frozenset()) == Trip(loop.blocks, loop.blocks)
    assert not flow.irreducible


def test_nested_and_sibling_loops():
    flow = flow_of("""
        NOP
        .L_x_0:
        MOV R1, RZ
        .L_x_1:
        FADD R1, R1, R2
        @P0 BRA `(.L_x_1)
        .L_x_2:
        FMUL R1, R1, R2
        @!P0 BRA `(.L_x_2)
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    outer, first, second = flow.loops
    assert first.parent is outer
    assert second.parent is outer
    assert opcodes(flow, first) == ["FADD", "BRA"]
    assert opcodes(flow, second) == ["FMUL", "BRA"]
    assert len(opcodes(flow, outer)) == 6


def test_rare_branch_is_in_the_loop_but_not_on_every_trip():
    """The slow path stands after the end of the kernel, and returns through its convergence barrier."""
    flow = flow_of("""
        NOP
        .L_x_0:
        MUFU.EX2 R2, R1
        BSSY B0, `(.L_x_1)
        @P1 BRA `(.L_x_2)
        FADD R3, R3, R2
        BSYNC B0
        .L_x_1:
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_2:
        FMUL R3, R3, R2
        FMUL R3, R3, R3
        BSYNC B0
    """)
    (loop,) = flow.loops
    assert count(flow.code(loop.blocks)).slots == 9
    assert count(flow.code(flow.trip(loop, frozenset()).must)).slots == 4


def test_one_side_of_a_branch():
    """A loop has a masked and an unmasked branch, and a `continue` before both. A turn takes one of these paths."""
    flow = flow_of("""
        NOP
        .L_x_0:
        IADD3 R0, R0, 0x1, RZ
        @P0 BRA `(.L_x_0)
        @P1 BRA `(.L_x_1)
        MUFU.EX2 R2, R1
        @P2 BRA `(.L_x_2)
        FMUL R2, R2, R2
        BRA `(.L_x_2)
        .L_x_1:
        MUFU.EX2 R3, R1
        FSEL R2, R3, RZ, P3
        .L_x_2:
        FADD R4, R4, R2
        @P4 BRA `(.L_x_0)
        EXIT
    """)
    (loop,) = flow.loops
    blocks = {opcode: frozenset(b for b in loop.blocks if opcode in opcodes_of(flow, b)) for opcode in ("FSEL", "FMUL")}
    masked = flow.trip(loop, blocks["FSEL"])
    assert masked.may == masked.must
    path = [x.opcode for x in flow.code(masked.may)]
    assert path == ["IADD3", "BRA", "BRA", "MUFU.EX2", "FSEL", "FADD", "BRA"]
    (exponential,) = (b for b in loop.blocks if "MUFU.EX2" in opcodes_of(flow, b) and b not in blocks["FSEL"])
    unmasked = flow.trip(loop, frozenset([exponential]))
    assert "FSEL" not in [x.opcode for x in flow.code(unmasked.may)]
    assert unmasked.may - unmasked.must == blocks["FMUL"]


def test_barrier_register_used_twice_makes_no_loop():
    """Each BSYNC belongs to the latest BSSY. Otherwise the second BSYNC would seem to jump back to the first label."""
    flow = flow_of("""
        BSSY B0, `(.L_x_0)
        @P0 BRA `(.L_x_0)
        BSYNC B0
        .L_x_0:
        FADD R1, R1, R1
        BSSY B0, `(.L_x_1)
        @P0 BRA `(.L_x_1)
        BSYNC B0
        .L_x_1:
        EXIT
    """)
    assert flow.loops == []


def test_ways_of_a_diverged_warp_are_not_followed():
    flow = flow_of("""
        NOP
        .L_x_0:
        BRA.DIV UR4, `(.L_x_3)
        SHFL.BFLY PT, R1, R2, 0x2, 0x1f
        .L_x_1:
        BRA.CONV ~URZ, `(.L_x_2)
        CALL.REL.NOINC `(warpsync)
        .L_x_2:
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_3:
        WARPSYNC.COLLECTIVE R6, `(.L_x_4)
        SHFL.BFLY PT, R1, R2, R3, R4
        .L_x_4:
        BRA `(.L_x_1)
    """)
    (loop,) = flow.loops
    assert opcodes(flow, loop) == ["BRA.DIV", "SHFL.BFLY", "BRA.CONV", "BRA"]


def test_call_of_a_label_leaves_a_loop():
    flow = flow_of("""
        NOP
        .L_x_0:
        NOP
        .L_x_1:
        FADD R1, R1, R1
        CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)
        @P0 CALL.REL.NOINC `(.L_x_2)
        BRA `(.L_x_1)
        .L_x_2:
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    outer, inner = flow.loops
    assert inner.parent is outer
    assert opcodes(flow, inner) == ["FADD", "CALL.REL.NOINC", "CALL.REL.NOINC", "BRA"]
    assert count(flow.code(inner.blocks)).calls == 1


def test_second_condition_of_a_branch_lets_it_fall_through():
    flow = flow_of("""
        NOP
        .L_x_0:
        FADD R1, R1, R1
        BRA.U UP0, `(.L_x_0)
        BRA P3, `(.L_x_0)
        FMUL R1, R1, R1
        EXIT
    """)
    (loop,) = flow.loops
    assert loop.back_edges == 2
    assert [instruction.opcode for instruction in flow.code(flow.reachable)][-2:] == ["FMUL", "EXIT"]


def test_continue_makes_one_loop_of_two_back_edges():
    flow = flow_of("""
        NOP
        .L_x_0:
        FADD R1, R1, R1
        @P0 BRA `(.L_x_0)
        FMUL R1, R1, R1
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    (loop,) = flow.loops
    assert loop.back_edges == 2
    assert [x.opcode for x in flow.code(flow.trip(loop, frozenset()).must)] == ["FADD", "BRA"]


def test_indirect_branch_follows_its_listed_targets():
    flow = flow_of("""
        NOP
        .L_x_0:
        BRX R2 -0x20 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
        .L_x_1:
        FADD R1, R1, R1
        BRA `(.L_x_0)
        .L_x_2:
        EXIT
    """)
    (loop,) = flow.loops
    assert opcodes(flow, loop) == ["BRX", "FADD", "BRA"]


def test_cycle_with_two_entries_is_reported():
    flow = flow_of("""
        @P0 BRA `(.L_x_1)
        .L_x_0:
        FADD R1, R1, R1
        .L_x_1:
        FMUL R1, R1, R1
        @P1 BRA `(.L_x_0)
        EXIT
    """)
    assert flow.irreducible
    assert flow.loops == []


@pytest.mark.parametrize(
    ("opcode", "operands", "predicate", "kind"),
    [
        ("HFMA2.MMA", "R8, -RZ, RZ, 0, 0", "", "move"),
        ("HFMA2.MMA", "R8, R4, R5, R6", "", "float"),
        ("HMMA.16816.F32.BF16", "R8, R20, R24, RZ", "", "tensor"),
        ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR8], RZ, !UPT, gsb0", "", "tensor"),
        ("IMAD.MOV.U32", "R4, RZ, RZ, R5", "", "move"),
        ("IMAD", "R4, RZ, RZ, UR5", "", "move"),
        ("IMAD.WIDE.U32", "R12, R10, 0x2, R12", "", "multiply"),
        ("LDGSTS.E.BYPASS.128", "[R6], desc[UR18][R16.64]", "P1", "global"),
        ("LDS", "RZ, [RZ]", "!PT", "void"),
        ("UIADD3", "UR4, UR4, 0x1, URZ", "", "uniform"),
        ("FFMA2", "R2, R4, R6, R8", "", "packed float"),
        ("STL.64", "[R1], R2", "", "local"),
        ("QUUX", "R1", "", "other"),
    ],
)
def test_classes(opcode, operands, predicate, kind):
    instruction = Instruction(opcode, operands, predicate)
    assert classify(instruction) == kind
    counts = count([instruction])
    assert counts.slots == 1
    assert sum(counts.classes.values()) == 1
    assert counts.unknown == ({"QUUX": 1} if kind == "other" else {})


def test_classes_add_up_to_slots_and_bytes_follow_the_width():
    flow = flow_of("""
        LDS.128 R0, [R1]
        @!PT LDS RZ, [RZ]
        LDSM.16.M88.4 R4, [R2]
        STS.U16 [R2], R0
        LDGSTS.E.BYPASS.128 [R6], desc[UR18][R16.64]
        LDG.E.64 R2, desc[UR4][R2.64]
        STL [R1], R2
        EXIT
    """)
    counts = count(flow.code(flow.reachable))
    assert counts.slots == sum(counts.classes.values()) == 8
    assert counts.shared_bytes == 16 + 16 + 2 + 16
    assert counts.global_bytes == 16 + 8
    assert counts.local_bytes == 4
    assert counts.loads_stores == 1 + 4 + 1 + 1 + 1 + 1


@pytest.mark.parametrize(
    ("opcode", "macs", "work"),
    [
        ("HMMA.16816.F32.BF16", 2048, 2048),
        ("HMMA.1688.F32", 1024, 1024),
        ("HMMA.1684.F32.TF32", 512, 1024),
        ("HGMMA.64x32x16.F32.BF16", 8192, 8192),  # a quarter of the multiply-adds of the warpgroup
        ("UTCHMMA", 0, 0),
    ],
)
def test_multiply_adds_of_tensor_instructions(opcode, macs, work):
    instruction = Instruction(opcode, "")
    counts = count([instruction])
    assert tensor_macs(instruction) == counts.tensor_macs == macs
    assert counts.tensor_work == work
    assert counts.tensor_unknown == (macs == 0)


def test_bytes_of_matrix_loads():
    sizes = [access_bytes(Instruction(opcode, "")) for opcode in ("LDSM.16.M88", "LDSM.16.M88.2", "LDSM.16.MT88.4")]
    assert sizes == [4, 8, 16]


_PRODUCT = "HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56, gsb0"


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ("MOV R23, R4", []),
        ("MOV R28, R4", []),
        ("MOV R27, R4", ["R27"]),  # a register of the first operand
        ("@P0 MOV R63, R4", ["R63"]),  # a register of the result
        ("MOV R64, R4", []),
        ("LDSM.16.M88.4 R20, [R2]", []),
        ("LDSM.16.M88.4 R22, [R2]", ["R24, R25"]),
        ("LDS.128 R25, [R2]", ["R25, R26, R27"]),
        ("IMAD.WIDE R54, R2, 0x2, R8", []),
        ("IMAD.WIDE R55, R2, 0x2, R8", ["R56"]),
        ("SHFL.BFLY PT, R24, R2, 0x2, 0x1f", ["R24"]),
        ("STS [R24], R56", []),
        ("@!PT LDS R24, [RZ]", []),
    ],
)
def test_registers_of_wgmma_written_too_early(between, found):
    flow = flow_of(f"""
        {_PRODUCT}
        {between}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MOV R24, R4
        EXIT
    """)
    count, early = early_writes(flow)
    assert count == 1
    assert [text.partition(" writes ")[2] for text in early] == found


def test_registers_of_wgmma_around_a_loop():
    """HGMMA of one turn still reads its registers when the next turn begins, if the wait leaves one group open."""
    loop = f"""
        NOP
        .L_x_0:
        MOV R24, R4
        {_PRODUCT}
        WARPGROUP.DEPBAR.LE gsb0, 0x%d
        @P0 BRA `(.L_x_0)
        MOV R4, R56
        EXIT
    """
    assert early_writes(flow_of(loop % 0))[1] == []
    (early,) = early_writes(flow_of(loop % 1))[1]
    assert early == "0010: MOV R24, R4 writes R24"
