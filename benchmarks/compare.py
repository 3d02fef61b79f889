"""`python -m benchmarks compare`: two files of rows, or this working tree against another revision, with verdicts."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .roofline import NAME as EXPONENTIALS
from .rows import Row, name, read

_ROOT = Path(__file__).parents[1]
_LEAST = 0.03  # a change of time below this is never called one: what interleaved runs of one revision differ by
_LEAST_BYTES = 2**20
_ERROR_FACTOR = 2.0  # rounding alone moves an error this much


def register(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="rows against rows, or this tree against a revision",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("rows", type=Path, nargs="*", metavar="ROWS", help="the rows before and the rows after")
    parser.add_argument("--base", metavar="REV", help="instead: measure this git revision and the working tree in turn")
    parser.add_argument("--run", default="--suite loss --seconds 2", metavar="OPTIONS", help="--base: options of `run`")
    parser.add_argument("--rounds", type=int, default=3, help="--base: turns of each")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Returns 1 where something is slower, larger, worse or broken."""
    if options.base is not None and not options.rows:
        before, after = _both(options.base, shlex.split(options.run), options.rounds)
    elif options.base is None and len(options.rows) == 2:
        before, after = (read([path]) for path in options.rows)
    else:
        raise ValueError("compare: expected two files of rows, or --base REV and none")
    lines, worse = verdicts(before, after)
    print("\n".join(lines))
    return int(worse)


def verdicts(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[str], bool]:
    """A line for each measurement that both have, the changed ones first, and whether any is for the worse."""
    old, new = ({_key(row): row for row in found if row["provider"] != EXPONENTIALS} for found in (before, after))
    lines: list[tuple[int, str]] = []
    for key in new:
        if key in old:
            found = _changes(old[key], new[key])
            rank = (
                0 if any(bad for bad, _ in found) else 1 if any(not text.startswith("same") for _, text in found) else 2
            )
            lines.append((rank, f"{name(new[key])}: {'; '.join(text for _, text in found)}"))
    for missing, of in ((set(old) - set(new), "before"), (set(new) - set(old), "after")):
        if missing:
            lines.append((3, f"{len(missing)} measurements only {of}"))
    if not set(old) & set(new):
        raise ValueError("compare: the two have no measurement in common (suite, provider, device, dtype, mode, shape)")
    lines.sort(key=lambda line: line[0])
    return [line for _, line in lines], lines[0][0] == 0


def _key(row: Row) -> str:
    identity: dict[str, Any] = {
        key: row[key] for key in ("suite", "provider", "device", "dtype", "mode", "method", "shape")
    }
    detail = row["detail"]
    identity |= {key: detail.get(key) for key in ("budget_bytes", "model", "largest_batch", "reduction")}
    if "kl" in detail:
        identity["kl"] = f"{detail['kl']:.1e}"
    if "budget_bytes" in detail or detail.get("largest_batch"):
        identity["shape"] = {**row["shape"], "B": None}
    identity["method"] = row["method"] if row["method"] == "graph" else None
    return json.dumps(identity, sort_keys=True)


def _changes(old: Row, new: Row) -> list[tuple[bool, str]]:
    """(for the worse, what), the time first."""
    if old["status"] != new["status"]:
        return [(old["status"] == "ok", f"{old['status']} → {new['status']} {new['reason'] or ''}".strip())]
    found = []
    if old["median_ms"] is not None and new["median_ms"] is not None:
        found.append(_time(old, new))
    for key, what, least in (("peak_bytes", "peak", _LEAST_BYTES), ("saved_bytes", "saved", _LEAST_BYTES)):
        a, b = old[key], new[key]
        if a is not None and b is not None and abs(b - a) > max(least, 0.05 * a):
            found.append((b > a, f"{what} {a / 2**20:.1f} → {b / 2**20:.1f} MiB"))
    for key, what in (("error_value", "error of the loss"), ("error_grad", "error of the gradient")):
        a, b = old[key], new[key]
        if (
            a is not None
            and b is not None
            and max(a, b) > 1e-6
            and not 1 / _ERROR_FACTOR < (b or 1e-12) / (a or 1e-12) < _ERROR_FACTOR
        ):
            found.append((b > a, f"{what} {a:.0e} → {b:.0e}"))
    if "budget_bytes" in new["detail"] and old["shape"]["B"] != new["shape"]["B"]:
        found.append((new["shape"]["B"] < old["shape"]["B"], f"largest B {old['shape']['B']} → {new['shape']['B']}"))
    return found or [(False, "same")]


def _time(old: Row, new: Row) -> tuple[bool, str]:
    """Noise: half the span of the middle 60 % of each; medians that differ by less than both together are the same."""
    ratio = new["median_ms"] / old["median_ms"]
    noise = sum((row["p80_ms"] - row["p20_ms"]) / 2 / row["median_ms"] for row in (old, new))
    threshold = max(_LEAST, noise)
    figures = (
        f"{old['median_ms']:.4g} → {new['median_ms']:.4g} ms ({100 * (ratio - 1):+.1f} %, noise {100 * noise:.1f} %)"
    )
    if abs(math.log(ratio)) <= math.log1p(threshold):
        return False, f"same time {figures}"
    return ratio > 1, f"{'slower' if ratio > 1 else 'faster'} {figures}"


def _both(revision: str, run: list[str], rounds: int) -> tuple[list[Row], list[Row]]:
    """Rows of the revision and of the working tree, measured in turn by this harness."""
    if rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more, got {rounds}")
    with _package_of(revision) as base, tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder, f"{side}.jsonl") for side in ("before", "after")}
        for _ in range(rounds):
            for side, root in (("before", base), ("after", _ROOT)):
                _measure(root, run, files[side], revision if side == "before" else None)
        return tuple(_merged(read([files[side]])) for side in ("before", "after"))  # type: ignore[return-value]


@contextmanager
def _package_of(revision: str) -> Iterator[Path]:
    """A folder with `minilm_kernels` of the revision, built, beside this tree's `benchmarks`."""
    with tempfile.TemporaryDirectory() as folder:
        tree, root = Path(folder, "tree"), Path(folder, "root")
        _call(["git", "-C", str(_ROOT), "worktree", "add", "--detach", str(tree), revision], f"--base {revision}")
        try:
            build = ["setup.py", "--quiet", "build", "--build-base", f"{folder}/objects", "--build-lib", str(root)]
            _call([sys.executable, *build], f"building {revision}", cwd=tree)
            (root / "benchmarks").symlink_to(Path(__file__).parent)
            yield root
        finally:
            _call(["git", "-C", str(_ROOT), "worktree", "remove", "--force", str(tree)], "removing the worktree")


def _measure(root: Path, run: list[str], file: Path, revision: str | None) -> None:
    environment = os.environ | {"PYTHONPATH": str(root)}
    if revision is not None:
        environment["MINILM_KERNELS_REVISION"] = revision
    command = [sys.executable, "-m", "benchmarks", "run", *run, "--out", str(file)]
    _call(command, f"measuring {revision or 'the working tree'}", cwd=root, env=environment)


def _call(command: list[str], what: str, **options: Any) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if result.returncode:
        raise ValueError(f"{what} failed: {(result.stderr.strip() or result.stdout.strip())[-2000:]}")


def _merged(found: Sequence[Row]) -> list[Row]:
    """One row a measurement: of the rounds, the median of the medians and the widest quantiles."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(_key(row), []).append(row)
    merged = []
    for members in groups.values():
        row = dict(members[-1])
        timed = [member for member in members if member["median_ms"] is not None]
        if timed:
            row["median_ms"] = statistics.median(member["median_ms"] for member in timed)
            row["p20_ms"] = min(member["p20_ms"] for member in timed)
            row["p80_ms"] = max(member["p80_ms"] for member in timed)
        merged.append(row)
    return merged
