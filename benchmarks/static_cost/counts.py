"""Counts of a piece of machine code: instructions by class, bytes moved, multiply-adds of the tensor cores.

One warp instruction takes one issue slot of its warp, which is 32 lane slots. A predicated instruction takes its slot
whether or not the predicate holds. An instruction under @!PT (a scheduling placeholder) takes a slot too, but its
memory access is not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from .sass import Instruction

# Class of an instruction by its opcode up to the first dot. Other opcodes have the class "other": they take an issue
# slot and no unit.
CLASSES = {
    "mufu": "MUFU",
    "tensor": "HMMA IMMA DMMA BMMA QMMA OMMA HGMMA IGMMA BGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "float": "FFMA FADD FMUL FSWZADD FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 HFMA2_32I HADD2_32I HMUL2_32I",
    "packed float": "FFMA2 FADD2 FMUL2",
    "double": "DFMA DADD DMUL DSETP",
    "compare": "FMNMX FMNMX3 FSETP FSET FSEL FCHK HMNMX2 HSETP2 HSET2 ISETP IMNMX VIMNMX VIMNMX3 SEL PLOP3 PSETP "
    "P2R R2P",
    "integer": "IADD3 IADD IABS LEA LOP3 LOP SHF SHL SHR PRMT SGXT BMSK IADD32I LOP32I VIADD VIADDMNMX ISCADD I2FP",
    "multiply": "IMAD IMUL IDP IDP4A",
    "convert": "F2F F2I I2F I2I FRND POPC FLO BREV",
    "pack": "F2FP I2IP",
    "move": "MOV MOV32I CS2R CS2UR S2R S2UR R2UR UR2UP LDC LDCU ULDC B2R R2B BMOV PRMTI",
    "shared": "LDS STS LDSM STSM ATOMS",
    "tensor memory": "LDTM STTM",
    "global": "LDG STG LD ST ATOM ATOMG RED REDG LDGSTS UBLKCP UTMALDG UTMASTG",
    "local": "LDL STL",
    "shuffle": "SHFL VOTE VOTEU REDUX CREDUX MATCH MOVM",
    "control": "BRA BRX BRXU JMP JMX JMXU EXIT CALL RET BSSY BSYNC BREAK NOP YIELD KILL BPT WARPSYNC NANOSLEEP "
    "BAR DEPBAR LDGDEPBAR MEMBAR ERRBAR FENCE WARPGROUP WARPGROUPSET ARRIVES SYNCS CCTL UCGABAR_ARV "
    "UCGABAR_WAIT ELECT PREEXIT ACQBULK UTCBAR UTCATOMSWS USETMAXREG",
}
_CLASS = {opcode: name for name, opcodes in reversed(CLASSES.items()) for opcode in opcodes.split()}
# A warp's instruction has m · n · k multiply-adds. The four warps of a group issue HGMMA together.
_MMA = {"884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32)}


@dataclass
class Counts:
    """Counts of warp instructions. `classes` adds up to `slots`; the other fields count certain instructions again.

    Counts of code that is executed now and then are multiples that need not be whole (`plus`).
    """

    slots: float = 0
    classes: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by class and opcode up to the first dot
    exponentials: float = 0
    tensor_macs: float = 0  # counted for the whole warp
    tensor_work: float = 0  # the same with tf32 counted twice, because tensor cores take twice as long for it
    tensor_unknown: float = 0  # tensor instructions whose size the opcode does not tell
    loads_stores: float = 0  # issue cycles of the load/store unit
    shared_wavefronts: float = 0  # passes of 128 bytes through shared memory, or of one shuffle
    shared_bytes: float = 0  # per lane, by the width of the register operands
    global_bytes: float = 0
    local_bytes: float = 0
    calls: float = 0
    unknown: Counter[str] = field(default_factory=Counter)

    def plus(self, other: Counts, factor: float = 1) -> Counts:
        """Returns these counts and `factor` times the other ones."""
        total = Counts()
        for item in fields(Counts):
            mine, more = getattr(self, item.name), getattr(other, item.name)
            if isinstance(mine, Counter):
                added = Counter({key: mine[key] + factor * more[key] for key in {**mine, **more}})
            else:
                added = mine + factor * more
            setattr(total, item.name, added)
        return total


def count(code: Iterable[Instruction]) -> Counts:
    counts = Counts()
    for instruction in code:
        counts.slots += 1
        kind = classify(instruction)
        counts.classes[kind] += 1
        counts.opcodes[kind, instruction.base] += 1
        if kind == "other":
            counts.unknown[instruction.base] += 1
        counts.exponentials += instruction.opcode.startswith("MUFU.EX2")
        counts.calls += instruction.base == "CALL" and "`(.L_" not in instruction.operands
        if kind == "tensor":
            macs = tensor_macs(instruction)
            counts.tensor_macs += macs
            counts.tensor_work += 2 * macs if "TF32" in instruction.opcode else macs
            counts.tensor_unknown += macs == 0
        if kind in ("shared", "global", "local"):
            size = access_bytes(instruction)
            counts.shared_bytes += size if kind == "shared" or instruction.base == "LDGSTS" else 0
            counts.global_bytes += size if kind == "global" else 0
            counts.local_bytes += size if kind == "local" else 0
        if kind in ("shared", "global", "local", "shuffle") and instruction.base not in ("VOTE", "VOTEU", "MOVM"):
            # A matrix load of four 8x8 tiles moves 512 bytes, four cycles of shared memory.
            counts.loads_stores += access_bytes(instruction) // 4 if instruction.base in ("LDSM", "STSM") else 1
            if kind == "shuffle":
                counts.shared_wavefronts += 1
            elif kind == "shared" or instruction.base == "LDGSTS":
                counts.shared_wavefronts += max(1, access_bytes(instruction) // 4)
    return counts


def classify(instruction: Instruction) -> str:
    if instruction.predicate in ("!PT", "!UPT"):
        return "void"
    base = instruction.base
    if base in ("IMAD", "HFMA2") and re.search(r"RZ\b.*, RZ", instruction.operands):  # zero times zero plus a value
        return "move"
    if base in _CLASS:
        return _CLASS[base]
    return "uniform" if base.startswith("U") else "other"


def tensor_macs(instruction: Instruction) -> int:
    """Multiply-adds of one warp; 0 if the opcode does not contain the size (tcgen05 has it in a descriptor)."""
    parts = instruction.opcode.split(".")
    for part in parts[1:]:
        if part in _MMA:
            m, n, k = _MMA[part]
            return m * n * k
        if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)", part):
            m, n, k = (int(number) for number in match.groups())
            return m * n * k // 4
    return 0


def access_bytes(instruction: Instruction) -> int:
    """Bytes that one lane moves."""
    parts = instruction.opcode.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return 4 * next((int(part) for part in parts[2:] if part in ("2", "4")), 1)
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((sizes[part] for part in parts[1:] if part in sizes), 4)
