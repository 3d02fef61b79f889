"""Tests the emulator with small PTX kernels: results of instructions, and detection of mistakes."""

from __future__ import annotations

import ctypes
from fractions import Fraction

import numpy as np
import pytest
import torch

from . import machine
from .fences import unfenced
from .findings import Findings
from .instructions import mma
from .memory import POISON, GlobalMemory
from .parser import parse

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
.maxntid 128, 1, 1
{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<99>;
    .reg .f32 %f<99>;
    .reg .b64 %d<99>;
    ld.param.u64 %d1, [kernel_param_0];
    ld.param.u64 %d2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %d3, %r1, 4;
    add.s64 %d4, %d1, %d3;  // &in[thread]
    add.s64 %d5, %d2, %d3;  // &out[thread]
    shl.b32 %r3, %r1, 2;    // 4 thread
"""


def run(body: str, given: np.ndarray, out: np.ndarray, threads: int = 32, blocks: int = 1, shared: int = 1024):
    """Executes `body` and returns the kinds of the findings."""
    kernel = parse(f"{HEAD}{body}\n    ret;\n}}\n")["kernel"]
    memory, findings = GlobalMemory(), Findings()
    for name, array in (("in", given), ("out", out)):
        memory.add(array.ctypes.data, array.nbytes, name)
    parameters = bytes(ctypes.c_uint64(given.ctypes.data)) + bytes(ctypes.c_uint64(out.ctypes.data))
    machine.run(machine.Launch(kernel, (blocks, 1, 1), (threads, 1, 1), shared, parameters, memory, findings))
    return [finding.kind for finding in findings.take()]


def compute(body: str, given, dtype=np.uint32, threads: int = 32, shared: int = 1024) -> np.ndarray:
    """Executes `body` and returns %r10 of every thread. %r4 of a thread holds its word of `given`."""
    out = np.zeros(threads, np.uint32)
    given = np.ascontiguousarray(given)
    words = np.zeros(threads, np.uint32)
    words[: given.size] = given.view(np.uint32)
    full = f"ld.global.u32 %r4, [%d4];\n{body}\nst.global.u32 [%d5], %r10;"
    assert run(full, words, out, threads, shared=shared) == []
    return out.view(dtype)


WORDS = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
FLOATS = np.random.default_rng(1).standard_normal(32).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r10, %r4, 7;", WORDS + np.uint32(7)),
        ("shl.b32 %r10, %r4, 33;", WORDS * 0),
        ("shr.s32 %r10, %r4, 40;", (WORDS.view(np.int32) >> 31).view(np.uint32)),
        ("bfe.u32 %r10, %r4, 3, 5;", WORDS >> 3 & 31),
        ("bfe.s32 %r10, %r4, 4, 1;", np.where(WORDS >> 4 & 1, np.uint32(0xFFFFFFFF), np.uint32(0))),
        ("mov.b32 {%h1, %h2}, %r4; mov.b32 %r10, {%h2, %h1};", WORDS << 16 | WORDS >> 16),
        ("lop3.b32 %r10, %r4, %r1, 0, 0x3c;", WORDS ^ np.arange(32, dtype=np.uint32)),
        ("bfi.b32 %r10, %r4, 0xFFFFFFFF, 8, 12;", WORDS << 8 & 0xFFF00 | 0xFFF000FF),
        ("bfi.b32 %r10, %r4, 7, 20, 99;", WORDS << 20 | 7),
        ("bfi.b32 %r10, %r4, 7, 32, 4;", np.full_like(WORDS, 7)),
        ("bfi.b32 %r10, %r4, 7, 3, 0;", np.full_like(WORDS, 7)),
        (
            "cvt.u64.u32 %d7, %r4; bfi.b64 %d8, %d7, 5, 32, 32; shr.u64 %d8, %d8, 32; cvt.u32.u64 %r10, %d8;",
            WORDS,
        ),
        ("cvt.u64.u32 %d7, %r4; bfi.b64 %d8, %d7, 5, 0, 64; cvt.u32.u64 %r10, %d8;", WORDS),
        ("prmt.b32 %r10, %r4, 0, 0x0123;", WORDS.byteswap()),
        ("setp.lt.u32 %p1, %r1, 5; selp.b32 %r10, 1, 2, %p1;", np.where(np.arange(32) < 5, 1, 2)),
        ("cvt.s64.s32 %d6, %r4; shr.u64 %d6, %d6, 32; cvt.u32.u64 %r10, %d6;", np.where(WORDS >> 31, 0xFFFFFFFF, 0)),
        ("mov.u32 %r5, -7; div.s32 %r10, %r5, 2;", np.full(32, 2**32 - 3)),
        ("mov.u32 %r5, -7; rem.s32 %r10, %r5, 2;", np.full(32, 2**32 - 1)),
        ("mul.hi.u32 %r10, %r4, %r4;", (WORDS.astype(np.uint64) ** 2 >> 32)),
    ],
)
def test_integers(body, expected):
    assert np.array_equal(compute(body, WORDS), np.asarray(expected).astype(np.uint32))


def test_floats():
    assert np.allclose(
        compute("mov.b32 %f1, %r4; ex2.approx.ftz.f32 %f2, %f1; mov.b32 %r10, %f2;", FLOATS, np.float32), 2.0**FLOATS
    )
    tiny = np.full(32, 1e-40, np.float32)
    assert (compute("mov.b32 %f1, %r4; add.ftz.f32 %f2, %f1, %f1; mov.b32 %r10, %f2;", tiny, np.float32) == 0).all()
    nan = np.full(32, np.nan, np.float32)
    assert (compute("mov.b32 %f1, %r4; max.f32 %f2, %f1, 0f40000000; mov.b32 %r10, %f2;", nan, np.float32) == 2).all()
    assert (compute("mov.b32 %f1, %r4; setp.neu.f32 %p1, %f1, %f1; selp.b32 %r10, 1, 0, %p1;", nan) == 1).all()
    assert (compute("mov.b32 %f1, %r4; setp.ne.f32 %p1, %f1, %f1; selp.b32 %r10, 1, 0, %p1;", nan) == 0).all()


@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("add.rn.f32x2 %d9, %d7, %d8;", lambda a, b: a + b),
        ("sub.rn.f32x2 %d9, %d7, %d8;", lambda a, b: a - b),
        ("mul.rn.f32x2 %d9, %d7, %d8;", lambda a, b: a * b),
        ("fma.rn.f32x2 %d9, %d7, %d8, %d7;", lambda a, b: a * b + a),
    ],
)
def test_two_floats_in_a_register(opcode, exact):
    """Both halves, against exact fractions: no other float32 is nearer. Threads that do not take part keep theirs."""
    first = FLOATS
    own, other = np.float32(0.7), np.float32(-1.9)
    for half in ("%f5", "%f6"):
        body = f"""
            mov.b32 %f1, %r4; mov.f32 %f2, 0f{own.view(np.uint32):08x}; mov.f32 %f3, 0f{other.view(np.uint32):08x};
            mov.b64 %d7, {{%f1, %f2}}; mov.b64 %d8, {{%f3, %f1}}; mov.b64 %d9, 0;
            setp.lt.u32 %p1, %r1, 31; @%p1 {opcode} mov.b64 {{%f5, %f6}}, %d9; mov.b32 %r10, {half};"""
        got = compute(body, first, np.float32)
        for lane in range(31):
            pair = (first[lane], other) if half == "%f5" else (own, first[lane])
            wanted, result = exact(*(Fraction(float(x)) for x in pair)), got[lane]
            near = [
                abs(Fraction(float(x)) - wanted)
                for x in (np.nextafter(result, -np.float32(9)), np.nextafter(result, np.float32(9)))
            ]
            assert abs(Fraction(float(result)) - wanted) <= min(near)
        assert got[31] == 0


def test_packing_to_bfloat16_rounds_to_even():
    packed = compute("mov.b32 %f1, %r4; neg.f32 %f2, %f1; cvt.rn.bf16x2.f32 %r10, %f2, %f1;", FLOATS)
    expected = torch.from_numpy(FLOATS).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(packed & 0xFFFF, expected)
    assert np.array_equal(packed >> 16, expected ^ 0x8000)


def test_sum_of_a_warp():
    got = compute("redux.sync.add.s32 %r10, %r4, -1;", WORDS)
    assert np.array_equal(got, np.full_like(got, WORDS.sum(dtype=np.uint64) & 0xFFFFFFFF))


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", "1", "31", lambda lane: lane ^ 1),
        ("bfly", "16", "31", lambda lane: lane ^ 16),
        ("idx", "3", "31", lambda lane: lane * 0 + 3),
        ("up", "1", "0", lambda lane: np.maximum(lane - 1, 0)),
        ("down", "2", "31", lambda lane: np.where(lane + 2 < 32, lane + 2, lane)),
        ("idx", "1", "0x1c03", lambda lane: (lane & ~3) | 1),
    ],
)
def test_shuffles(mode, by, clamp, source):
    got = compute(f"shfl.sync.{mode}.b32 %r10, %r4, {by}, {clamp}, -1;", WORDS)
    assert np.array_equal(got, WORDS[source(np.arange(32))])


FILL = "add.s32 %r5, %r3, memory; st.shared.u32 [%r5], %r4;"


def test_ldmatrix_and_its_transpose():
    """Shared memory holds words 0, 1, ..., read as 16-bit elements in row r, column c of an 8 x 8 matrix."""
    words = np.arange(32, dtype=np.uint32) * 2 | (np.arange(32, dtype=np.uint32) * 2 + 1) << 16
    rows = f"{FILL} bar.warp.sync -1; and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, 4;"
    got = compute(rows + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r6];", words)
    assert np.array_equal(got, words)
    got = compute(rows + "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r10}, [%r6];", words)
    lane = np.arange(32, dtype=np.uint32)
    low = (2 * (lane % 4)) * 8 + lane // 4  # element (2t, g)
    assert np.array_equal(got, low | (low + 8) << 16)
    assert np.array_equal(compute("movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r4;", words), got)


def test_stmatrix_is_the_inverse_of_ldmatrix():
    rows = "and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, 4; add.s32 %r6, %r6, memory;"
    for kind in ("", ".trans"):
        body = f"{rows} stmatrix.sync.aligned.m8n8.x1{kind}.shared.b16 [%r6], {{%r4}}; bar.warp.sync -1;"
        body += f"ldmatrix.sync.aligned.m8n8.x1{kind}.shared.b16 {{%r10}}, [%r6];"
        assert np.array_equal(compute(body, WORDS), WORDS)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("k", [8, 16])
def test_mma(kind, k):
    """Compares products with NumPy. The fragment layouts of the PTX manual are written out element by element."""
    rng = np.random.default_rng(2)
    a, b, c = rng.integers(-8, 8, (16, k)), rng.integers(-8, 8, (k, 8)), rng.integers(-8, 8, (16, 8))

    def bits(x) -> int:
        return int(np.float32(x).view(np.uint32)) >> 16 if kind == "bf16" else int(np.float16(x).view(np.uint16))

    words = np.zeros((32, 16), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(k // 4):  # a0 ...: two elements each
            row, column = g + 8 * (i % 2), 2 * t + 8 * (i // 2)
            words[lane, i] = bits(a[row, column]) | bits(a[row, column + 1]) << 16
        for i in range(k // 8):
            words[lane, 4 + i] = bits(b[2 * t + 8 * i, g]) | bits(b[2 * t + 1 + 8 * i, g]) << 16
        for i in range(4):
            words[lane, 8 + i] = np.float32(c[g + 8 * (i // 2), 2 * t + i % 2]).view(np.uint32)
    loads = "mul.wide.u32 %d6, %r1, 64; add.s64 %d7, %d1, %d6; add.s64 %d8, %d2, %d6;"
    loads += "".join(
        f"ld.global.v4.u32 {{%r{20 + 4 * i}, %r{21 + 4 * i}, %r{22 + 4 * i}, %r{23 + 4 * i}}}, [%d7+{16 * i}];"
        for i in range(3)
    )
    left, right = ("{%r20, %r21}", "{%r24}") if k == 8 else ("{%r20, %r21, %r22, %r23}", "{%r24, %r25}")
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32"
    product = f"{opcode} {{%r40, %r41, %r42, %r43}}, {left}, {right}, {{%r28, %r29, %r30, %r31}};"
    out = np.zeros((32, 16), np.uint32)
    assert run(loads + product + "st.global.v4.u32 [%d8], {%r40, %r41, %r42, %r43};", words, out) == []
    got = np.zeros((16, 8))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            got[g + 8 * (i // 2), 2 * t + i % 2] = out[lane, i : i + 1].view(np.float32)[0]
    assert np.array_equal(got, a @ b + c)


def test_tensor_cores_truncate():
    """2^25 + 1 + ... + 1 loses what lies beyond 25 or 26 bits, and everything beyond the 24 bits of the sum."""
    left, right = np.ones((1, 1, 8)), np.ones((1, 1, 8))
    left[0, 0, 0] = 2.0**25
    zero = np.zeros((1, 1, 1), np.float32)
    assert mma.multiply(left, right, zero, *mma.A100)[0, 0, 0] == 2**25  # addends are multiples of 2
    left[0, 0, 0] = 2.0**24
    assert mma.multiply(left, right, zero, *mma.A100)[0, 0, 0] == 2**24 + 6  # 7, truncated
    left[0, 0, 0] = 2.0**25
    assert mma.multiply(left, right, zero, *mma.H100)[0, 0, 0] == 2**25 + 4  # 7, truncated
    assert mma.multiply(-left, right, zero, *mma.H100)[0, 0, 0] == -(2**25) - 4


def test_divergence_and_loops():
    """Thread i adds 1 i times, and the two halves of a warp take different branches."""
    body = """
    mov.u32 %r10, 0;
    mov.u32 %r6, 0;
LOOP:
    setp.ge.u32 %p1, %r6, %r1;
    @%p1 bra DONE;
    add.s32 %r6, %r6, 1;
    add.s32 %r10, %r10, 1;
    bra.uni LOOP;
DONE:
    and.b32 %r7, %r1, 1;
    setp.eq.s32 %p2, %r7, 0;
    @!%p2 bra ODD;
    add.s32 %r10, %r10, 100;
    bra.uni JOIN;
ODD:
    add.s32 %r10, %r10, 200;
JOIN:
    shfl.sync.idx.b32 %r11, %r10, 31, 31, -1;
    """
    lane = np.arange(32)
    assert np.array_equal(compute(body, WORDS), lane + np.where(lane % 2, 200, 100))


SUM = FILL + "{} xor.b32 %r6, %r5, 256; ld.shared.u32 %r7, [%r6]; st.global.u32 [%d5], %r7;"


def _two_arrays(threads: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(threads, dtype=np.uint32), np.zeros(threads, np.uint32)


LOAD = "ld.global.u32 %r4, [%d4];"


def test_a_barrier_orders_warps():
    given, out = _two_arrays(128)
    assert run(LOAD + SUM.format("bar.sync 0;"), given, out, 128) == []
    assert np.array_equal(out, given ^ 64)


def test_a_missing_barrier_is_a_race():
    assert "race: shared memory is read" in run(LOAD + SUM.format(""), *_two_arrays(128), 128)


def test_a_missing_barrier_of_a_warp_is_a_race():
    body = LOAD + FILL + "{} xor.b32 %r6, %r5, 4; ld.shared.u32 %r7, [%r6]; st.global.u32 [%d5], %r7;"
    assert run(body.format("bar.warp.sync -1;"), *_two_arrays(32)) == []
    assert "race: shared memory is read" in run(body.format(""), *_two_arrays(32))


def test_a_write_after_reads_is_a_race():
    body = LOAD + SUM.format("bar.sync 0;") + "{} st.shared.u32 [%r5], %r1;"
    assert run(body.format("bar.sync 0;"), *_two_arrays(128), 128) == []
    assert "race: shared memory is written" in run(body.format(""), *_two_arrays(128), 128)


def test_two_blocks_that_write_one_place():
    found = run("st.global.u32 [%d5], %r2;", *_two_arrays(32), blocks=2)
    assert found == ["race: global memory gets two values at once"]
    later = "setp.eq.s32 %p1, %r2, 0; @%p1 bra A; st.global.u32 [%d5], %r2; bra.uni B;\n"
    later += "A:\n st.global.u32 [%d5], %r2;\nB:\n"
    assert run(later, *_two_arrays(32), blocks=2) == ["race: global memory is written"]


def test_bytes_of_one_word_are_different_places():
    body = "mul.wide.u32 %d6, %r2, {}; add.s64 %d6, %d2, %d6; cvt.u16.u32 %h1, %r2; st.global.u8 [%d6], %h1;"
    assert run(body.format(1), *_two_arrays(32), blocks=2) == []
    assert run(body.format(0), *_two_arrays(32), blocks=2) == ["race: global memory gets two values at once"]


def test_lanes_that_store_to_one_place_are_noted():
    found = run("st.shared.u32 [memory], %r1; bar.sync 0;", *_two_arrays(32))
    assert found == ["note: lanes of a warp store different values to one place of shared memory"]
    found = run("st.shared.u32 [memory], %r1; bar.sync 0;", *_two_arrays(64), 64)
    assert "race: shared memory gets two values at once" in found
    assert run("st.shared.u32 [memory], %r2; bar.sync 0;", *_two_arrays(64), 64) == []  # all the same


def test_uninitialised_memory():
    assert "uninitialised shared memory is read" in run("ld.shared.u32 %r4, [%r3];", *_two_arrays(32))
    fresh = np.full(32, POISON, np.uint32)
    assert "uninitialised global memory is read" in run(LOAD, fresh, np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("ld.global.u32 %r4, [%d4+4];", "out-of-bounds read of 4 bytes"),
        ("st.global.u32 [%d5+-4], %r1;", "out-of-bounds write of 4 bytes"),
        ("ld.global.v2.u32 {%r4, %r5}, [%d1+4];", "misaligned read of 8 bytes"),
        ("st.shared.u32 [%r3+1024], %r1;", "out-of-bounds write of 4 bytes"),
        ("st.shared.u32 [%r3+2], %r1;", "misaligned write of 4 bytes"),
    ],
)
def test_wrong_addresses(body, found):
    assert found in run(body, *_two_arrays(32))


def test_copies_are_not_there_before_they_are_waited_for():
    body = """
    and.b32 %r6, %r3, 127;
    mov.u32 %r8, 4;
    cp.async.ca.shared.global [%r6], [%d4], 0x4, %r8;
    cp.async.commit_group;
    {}
    ld.shared.u32 %r10, [%r6];
    st.global.u32 [%d5], %r10;
    """
    given, out = _two_arrays(32)
    assert run(body.format("cp.async.wait_group 0;"), given, out) == []
    assert np.array_equal(out, given)
    assert "uninitialised shared memory is read" in run(body.format("cp.async.wait_group 1;"), given, out)


def test_part_of_a_warp_at_an_instruction_of_all():
    body = "setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;"
    assert "part of a warp at an instruction of all" in run(body, *_two_arrays(32))


def test_a_barrier_that_not_all_threads_reach():
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bar.sync 0; bra.uni B;\nA:\n bar.sync 0;\nB:\n"
    kinds = run(body, *_two_arrays(64), 64)
    assert kinds == []  # the barrier does not wait for a warp that has ended
    body = "setp.lt.u32 %p1, %r1, 7; @%p1 bra A; bar.warp.sync -1;\nA:\n"
    assert run(body, *_two_arrays(32)) != []


COPIES = """
    cp.async.ca.shared.global [%r3], [%d4], 0x10, 16;
    cp.async.commit_group;
LOOP:
    {before}
    cp.async.wait_group 0;
    bar.sync 0;
    {behind}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %d6, %d7, %p1, 1, 1, 0, 0;
    cp.async.ca.shared.global [%r3], [%d4], 0x10, 16;
    cp.async.commit_group;
    @%p2 bra LOOP;
"""


@pytest.mark.parametrize(
    ("before", "behind", "missing"),
    [
        ("", "fence.proxy.async.shared::cta;", 0),
        ("fence.proxy.async.shared::cta;", "", 1),  # as in code of Triton before 3.7.1
        ("", "", 1),
        ("", "fence.proxy.async; st.shared.u32 [%r3], %r1;", 1),
        ("", "@%p3 bra ON; fence.proxy.async;\nON:", 1),  # a path around the fence
    ],
)
def test_wgmma_behind_a_fence(before, behind, missing):
    kernel = parse(f"{HEAD}{COPIES.format(before=before, behind=behind)}\n    ret;\n}}\n")["kernel"]
    assert len(unfenced(kernel)) == missing
