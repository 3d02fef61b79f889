"""Rates of a multiprocessor per clock, by architecture, and the bounds that follow (sources: docs/static-cost.md)."""

from __future__ import annotations

from dataclasses import dataclass

from .counts import Counts


@dataclass(frozen=True)
class Machine:
    """One GPU model of an architecture. Rates are in lanes per clock and multiprocessor, unless a comment differs."""

    name: str
    sms: int
    clock: float  # GHz, the boost clock of the data sheet
    max_warps: int
    max_blocks: int
    shared: int  # shared memory of a multiprocessor in bytes, including the 1 KiB that is reserved per block
    tensor: int  # bf16 multiply-adds that mma.sync reaches
    tensor_wide: int  # bf16 multiply-adds that wgmma or tcgen05 reaches
    float_: int = 128
    alu: int = 64
    exponential: int = 16
    issue: int = 128
    conversion: int = 16
    pack: int = 32
    multiply: int = 64
    load_store: int = 32
    l2: float = 64  # bytes that reach a multiprocessor per clock, if all of them read

    def clocks(self, counts: Counts, wide_tensor: bool, l2_bytes: float = 0) -> dict[str, float]:
        """Clocks that each unit needs for the counts of one warp that runs alone on the multiprocessor."""
        classes = counts.classes
        floats = classes["float"] + 2 * classes["packed float"]
        lanes = {
            "issue": counts.slots / self.issue,
            "mufu": counts.exponentials / self.exponential
            + (classes["mufu"] - counts.exponentials + classes["convert"]) / 16,
            "float": (floats + classes["multiply"]) / self.float_,
            "multiply": classes["multiply"] / self.multiply,
            "alu": (classes["integer"] + classes["compare"]) / self.alu,
            "pack": classes["pack"] / self.pack,
            "load/store": counts.loads_stores / self.load_store,
        }
        clocks = {unit: 32 * value for unit, value in lanes.items()}
        clocks["tensor"] = counts.tensor_work / (self.tensor_wide if wide_tensor else self.tensor)
        clocks["shared"] = counts.shared_wavefronts  # one wavefront of 128 bytes per clock
        clocks["l2"] = l2_bytes / self.l2
        return clocks

    def resident_blocks(self, warps: int, registers: int, shared: int) -> int:
        """Blocks that fit on a multiprocessor, for `warps` and `shared` bytes per block and `registers` per thread."""
        # Registers are allocated in units of 8 per thread; each quarter of the multiprocessor has 16 384.
        by_registers = 4 * (16384 // (-(-max(registers, 1) // 8) * 8 * 32)) // warps
        return min(self.max_blocks, self.max_warps // warps, by_registers, self.shared // (shared + 1024))

    def milliseconds(self, clocks_per_pair: float, pairs: float) -> float:
        return 1e-6 * clocks_per_pair * pairs / (self.sms * self.clock)


_KIB = 1024
MACHINES = {
    "sm_80": Machine("A100", 108, 1.41, 64, 32, 164 * _KIB, 1024, 1024, float_=64, l2=5120 / 108),
    "sm_86": Machine("RTX 3090", 82, 1.695, 48, 16, 100 * _KIB, 256, 256),
    "sm_89": Machine("RTX 4090", 128, 2.52, 48, 24, 100 * _KIB, 256, 256),
    "sm_90": Machine("H100 SXM / H200", 132, 1.83, 64, 32, 228 * _KIB, 1280, 2048, l2=5120 / 132),
    "sm_100": Machine("B200", 148, 1.85, 64, 32, 228 * _KIB, 1024, 4096),
    "sm_120": Machine("RTX 5090", 170, 2.407, 48, 24, 100 * _KIB, 256, 256, alu=128),
}
