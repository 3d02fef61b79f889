"""Measure the effect of each optimization of the CPU kernels, by comparison with a build without it.

The command builds the package unchanged, and with one optimization removed at a time by changing one constant in
csrc/cpu. It measures all builds in turn on one thread. docs/cpu.md explains the optimizations and their predicted
effects, which are counts of instructions.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.commands.compare import merged
from benchmarks.measure import builds, records
from benchmarks.reporting import sections


class Variant(NamedTuple):
    """A build of the kernels with a changed constant or another instruction set."""

    name: str
    predicted: str = ""
    constant: str = ""
    value: str = ""
    instruction_set: str = "avx512-paired"
    relative_to: str | None = "unchanged"


AVX512 = "AVX-512 instead of AVX2"
VARIANTS = [
    Variant("unchanged", relative_to=None),
    Variant("unordered pairs instead of row blocks", "2.1 ×", "kMinSymmetricTokens", "int64_t{1} << 40"),
    Variant("cached exponentials for phase 2", "1.6 ×", "kExpCacheBytes", "0"),
    Variant("neighbouring heads gathered together", "1.07 × at S = 128", "kMaxHeads", "1"),
    Variant("panels of 256 keys instead of 64", "", "kPanelBlocks", "4"),
    Variant("features in pairs", "1.1 to 1.2 ×", instruction_set="avx512"),
    Variant(AVX512, "2 ×", instruction_set="avx2-paired"),
    Variant("AVX2 instead of portable code", "2 to 4 ×", instruction_set="portable", relative_to=AVX512),
]
CASES = ["16x48x128x16x8", "1x48x512x16x8", "1x12x1024x16x8", "1x8x2048x16x8", "2x12x512x64x32"]
_RUN = ["--device", "cpu", "--providers", "cpu", "--threads", "1", "--seconds", "0.5", "--interleave", "--shapes"]


def register(commands: argparse._SubParsersAction) -> None:
    about = "measure the effect of each optimization of the CPU kernels"
    parser = commands.add_parser("ablation", help=about, description=__doc__)
    out = records.RESULTS / "cpu-ablation.jsonl"
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each build")
    parser.add_argument("--out", type=Path, default=out, help="file of the records, overwritten")
    parser.add_argument("--update", type=Path, metavar="FILE", help="Markdown file whose table is updated")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    found = measure(options.rounds)
    options.out.unlink(missing_ok=True)
    for record in found:
        records.append(options.out, record)
    print(sections.markdown(found)["ablation"])
    if options.update is not None:
        sections.update_file(options.update, found, None)


def measure(rounds: int) -> list[records.Record]:
    made = []
    with tempfile.TemporaryDirectory() as folder:
        roots: dict[str, Path] = {}
        for variant in tqdm(VARIANTS, "build", disable=None):
            if variant.constant not in roots:
                roots[variant.constant] = _build(variant, Path(folder, variant.constant or "unchanged"))
        for variant in tqdm(VARIANTS * rounds, "measure", disable=None):
            file = Path(folder, variant.name)
            builds.measure(roots[variant.constant], [*_RUN, *CASES], file, MINILM_KERNELS_CPU=variant.instruction_set)
        for variant in VARIANTS:
            detail = {"predicted": variant.predicted, "relative_to": variant.relative_to}
            found = [r for r in merged(records.read([Path(folder, variant.name)])) if r["provider"] == "cpu"]
            made += [r | {"suite": "ablation", "provider": variant.name, "detail": detail} for r in found]
    return made


def _build(variant: Variant, folder: Path) -> Path:
    """Build a copy of the package with the variant's constant."""
    builds.copy_sources(folder)
    changed = not variant.constant
    for file in (folder / "csrc/cpu").glob("*") if variant.constant else ():
        pattern = rf"(\b{variant.constant} = )[^;,]+"
        text, count = re.subn(pattern, rf"\g<1>{variant.value}", file.read_text(encoding="utf-8"))
        file.write_text(text, encoding="utf-8")
        changed |= bool(count)
    if not changed:
        raise ValueError(f"csrc/cpu no longer has a constant {variant.constant}")
    return builds.build(folder, folder / "build")
