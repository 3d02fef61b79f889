"""Measure the effect of each optimisation of the CPU kernels, against a build without it.

Builds csrc/cpu as it is and with one optimisation removed at a time, by a change of one constant of the source, and
measures all builds in turns: one thread, thread time, the fastest turn of each. docs/cpu.md explains the optimisations
and their predicted effects, which are counted instructions.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.measure import records
from benchmarks.measure.workload import Workload
from benchmarks.reporting import sections

_ROOT = Path(__file__).parents[2]
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-w"]
_UNITS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mfma"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_portable.cpp": [],
    "relation.cpp": [],
}


class Variant(NamedTuple):
    """A build of the kernels: `file` with another value of a constant, or another instruction set."""

    name: str
    predicted: str = ""
    file: str = ""
    constant: str = ""
    value: str = ""
    instruction_set: str = "avx512-paired"
    relative_to: str | None = "as it is"


VARIANTS = [
    Variant("as it is", relative_to=None),
    Variant("unordered pairs instead of strips", "2.1 ×", "relation.cpp", "kFewTokens", "int64_t{1} << 40"),
    Variant("exponentials kept for the second phase", "1.6 ×", "relation.cpp", "kKeptBytes", "0"),
    Variant("neighbouring heads gathered together", "1.07 × at S = 128", "relation.cpp", "kMostHeads", "1"),
    Variant("panels of 256 keys instead of 64", "", "kernels.inl", "kPanelBlocks", "4"),
    Variant("features in pairs", "1.1 to 1.2 ×", instruction_set="avx512"),
    Variant("AVX-512 instead of AVX2", "2 ×", instruction_set="avx2-paired"),
    Variant(
        *("AVX2 instead of portable code", "2 to 4 ×"),
        instruction_set="portable",
        relative_to="AVX-512 instead of AVX2",  # one instruction set further back
    ),
]
CASES = ["16x48x128x16x8", "1x48x512x16x8", "1x12x1024x16x8", "1x8x2048x16x8", "2x12x512x64x32"]


def register(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ablation",
        help="measure the effect of each optimisation of the CPU kernels",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out = records.RESULTS / "cpu-ablation.jsonl"
    parser.add_argument("--turns", type=int, default=10, help="turns of each build")
    parser.add_argument("--out", type=Path, default=out, help="file of the records, overwritten")
    parser.add_argument("--update", type=Path, metavar="FILE", help="Markdown file whose table is updated")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> None:
    found = measure(options.turns)
    options.out.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    print(sections.markdown(found)["ablation"])
    if options.update is not None:
        sections.update_file(options.update, found, None)


def measure(turns: int) -> list[records.Record]:
    best: dict[tuple[Variant, str], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        builds = tqdm(enumerate(VARIANTS), "build", len(VARIANTS), disable=None)
        programs = [(variant, build(variant, Path(temporary, str(i)))) for i, variant in builds]
        for _ in tqdm(range(turns), "turns", disable=None):
            for variant, program in programs:
                for line in _call(program, variant.instruction_set, 3, *CASES).splitlines():
                    case, fastest = line.split()[:2]
                    best[variant, case] = min(best.get((variant, case), float("inf")), float(fastest))
    return [record(variant, case, value) for (variant, case), value in best.items()]


def record(variant: Variant, case: str, ns_per_pair: float) -> records.Record:
    workload = Workload.parse(case)
    detail = {"ns_per_pair": ns_per_pair, "predicted": variant.predicted, "relative_to": variant.relative_to}
    # Only the speed is compared: tests check that the builds compute the same.
    made = records.new("ablation", variant.name, workload, pairs=workload.pairs, detail=detail, status="ok")
    return made | {"device": platform.machine()}


def build(variant: Variant, folder: Path) -> Path:
    """Compile csrc/cpu as the variant says; return the program that measures it."""
    sources = folder / "source"
    sources.mkdir(parents=True)
    for path in (_ROOT / "csrc/cpu").glob("*"):
        text = path.read_text(encoding="utf-8")
        if path.name == variant.file:
            pattern = rf"(\b{variant.constant} = )[^;,]+"
            text, found = re.subn(pattern, rf"\g<1>{variant.value}", text, count=1)
            if not found:
                raise ValueError(f"{variant.file} no longer has a constant {variant.constant}")
        (sources / path.name).write_text(text, encoding="utf-8")
    objects = []
    for name, flags in _UNITS.items():
        objects.append(folder / f"{name}.o")
        _call("c++", *_FLAGS, *flags, "-c", sources / name, "-o", objects[-1])
    program = folder / "measure"
    _call("c++", *_FLAGS, "-I", sources, Path(__file__).with_name("measure.cpp"), *objects, "-o", program)
    return program


def _call(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
