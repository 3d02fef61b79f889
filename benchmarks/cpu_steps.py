"""What each optimisation of the CPU kernels is worth: `python -m benchmarks.cpu_steps --out ROWS --update docs/cpu.md`.

Builds csrc/cpu as it is and with one optimisation taken back at a time, by setting one constant of the source, and
measures all of them in turns: one thread, thread time, the fastest turn of each. Predictions are counted instructions
(docs/cpu.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from examples.demo.markers import update

_ROOT = Path(__file__).parents[1]
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", f"-I{_ROOT / 'csrc'}"]
_UNITS = {
    "kernels_avx512.cpp": ["-mavx512f", "-mfma"],
    "kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "kernels_portable.cpp": [],
    "driver.cpp": [],
}


@dataclass(frozen=True)
class Step:
    """An optimisation, and what takes it back."""

    name: str
    predicted: str = ""
    file: str = ""
    constant: str = ""
    without: str = ""
    instruction_set: str = "avx512-paired"


AS_IT_IS = Step("as it is")
STEPS = [
    Step("unordered pairs instead of strips", "2.1 ×", "driver.cpp", "kMinSymmetricTokens", "int64_t{1} << 40"),
    Step("exponentials kept for the second phase", "1.6 ×", "driver.cpp", "kExpCacheBytes", "0"),
    Step("neighbouring heads gathered together", "1.07 × at S = 128", "driver.cpp", "kMaxHeads", "1"),
    Step("panels of 256 keys instead of 64", "", "kernels.inl", "kPanelBlocks", "4"),
    Step("features in pairs", "1.1 to 1.2 ×", instruction_set="avx512"),
    Step("AVX-512 instead of AVX2", "2 ×", instruction_set="avx2-paired"),
    Step("AVX2 instead of portable code", "2 to 4 ×", instruction_set="portable"),
]
CASES = ["16x48x128x16x8", "1x48x512x16x8", "1x12x1024x16x8", "1x8x2048x16x8", "2x12x512x64x32"]


def build(step: Step, folder: Path) -> Path:
    """Compiles csrc/cpu with the step taken back; returns the program."""
    sources = folder / "source"
    sources.mkdir(parents=True)
    for path in (_ROOT / "csrc/cpu").glob("*"):
        text = path.read_text(encoding="utf-8")
        if path.name == step.file:
            pattern = rf"(\b{step.constant} = )[^;,]+"
            text, found = re.subn(pattern, rf"\g<1>{step.without}", text, count=1)
            if not found:
                raise ValueError(f"{step.file} has no constant {step.constant} any more")
        (sources / path.name).write_text(text, encoding="utf-8")
    objects = []
    for name, flags in _UNITS.items():
        objects.append(folder / f"{name}.o")
        _call(["c++", *_FLAGS, *flags, "-w", "-c", sources / name, "-o", objects[-1]])
    program = folder / "measure"
    _call(["c++", *_FLAGS, "-I", sources, Path(__file__).with_suffix(".cpp"), *objects, "-o", program])
    return program


def _call(command: list[str | Path]) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(turns: int) -> list[dict]:
    steps = [AS_IT_IS, *STEPS]
    best: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        programs = [build(step, Path(temporary) / str(i)) for i, step in enumerate(tqdm(steps, "build", disable=None))]
        for _ in tqdm(range(turns), "turns", disable=None):
            for step, program in zip(steps, programs, strict=True):
                for line in _call([program, step.instruction_set, "3", *CASES]).splitlines():
                    case, fastest = line.split()[:2]
                    key = (step.name, case)
                    best[key] = min(best.get(key, float("inf")), float(fastest))
    return [
        {"suite": "cpu steps", "step": step, "shape": case, "ns_a_pair": value, "machine": platform.machine()}
        for (step, case), value in best.items()
    ]


def markdown(rows: list[dict]) -> str:
    value = {(row["step"], row["shape"]): row["ns_a_pair"] for row in rows}
    cases = [case for case in CASES if (AS_IT_IS.name, case) in value]
    titles = [f"S = {s}, ({d_t}, {d_s})" for _, _, s, d_t, d_s in (case.split("x") for case in cases)]
    lines = [f"| | predicted | {' | '.join(titles)} |", "|---|---|" + "---|" * len(cases)]
    times = (f"{value[AS_IT_IS.name, case]:.2f}" for case in cases)
    lines.append(f"| {AS_IT_IS.name}, ns a pair | | " + " | ".join(times) + " |")
    # Each of the last two rows goes one instruction set further back.
    before = {STEPS[-1].name: STEPS[-2].name}
    for step in STEPS:
        base = before.get(step.name, AS_IT_IS.name)
        factors = (f"{value[step.name, case] / value[base, case]:.2f} ×" for case in cases)
        lines.append(f"| {step.name} | {step.predicted} | " + " | ".join(factors) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_steps", description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="file for the rows, overwritten")
    parser.add_argument("--update", type=Path, metavar="FILE", help="Markdown file that gets the table, at its markers")
    options = parser.parse_args()
    rows = measure(options.turns)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = markdown(rows)
    print(text)
    if options.update is not None:
        update(options.update, "steps", text)


if __name__ == "__main__":
    main()
