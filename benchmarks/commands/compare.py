"""`python -m benchmarks compare`: verdicts on two files of records, or on this tree and another revision."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import builds
from benchmarks.measure.records import Record, describe, read
from benchmarks.reporting.tables import Records, groups, providers

_MIN_CHANGE = 0.03  # smaller changes of time are noise: interleaved runs of one revision differ by as much
_ERROR_FACTOR = 2.0  # rounding alone may change an error by this factor


def register(commands: argparse._SubParsersAction) -> None:
    about = "compare records with records, or this tree with a revision"
    parser = commands.add_parser("compare", help=about, description=__doc__)
    parser.add_argument("records", type=Path, nargs="*", metavar="RECORDS", help="the records before and after")
    parser.add_argument("--base", metavar="REV", help="measure this git revision and the working tree instead, in turn")
    parser.add_argument("--run", default="--suite loss --seconds 2", metavar="OPTIONS", help="--base: options of `run`")
    parser.add_argument("--rounds", type=int, default=3, help="--base: number of measurements of each")
    parser.set_defaults(main=main)


def main(options: argparse.Namespace) -> int:
    """Return 1 if something is slower, larger, less accurate or broken."""
    if options.base is not None and not options.records:
        before, after = _measure_both(options.base, shlex.split(options.run), options.rounds)
    elif options.base is None and len(options.records) == 2:
        before, after = (read([path]) for path in options.records)
    else:
        raise ValueError("compare: expected two files of records, or --base REV without files")
    lines, worse = verdicts(before, after)
    print("\n".join(lines))
    return int(worse)


def verdicts(before: Records, after: Records) -> tuple[list[str], bool]:
    """One line per common measurement, with changes for the worse first, and True if there are such changes."""
    old, new = ({_identity(r): r for r in providers(found)} for found in (before, after))
    if not set(old) & set(new):
        raise ValueError(
            "compare: the records have no measurement in common (suite, provider, device, dtype, mode, shape)"
        )
    lines: list[tuple[int, str]] = []
    for key in [key for key in new if key in old]:
        changes = _changes(old[key], new[key])
        same = all(text.startswith("same") for _, text in changes)
        rank = 0 if any(worse for worse, _ in changes) else 2 if same else 1
        lines.append((rank, f"{describe(new[key])}: {'; '.join(text for _, text in changes)}"))
    for missing, side in ((set(old) - set(new), "before"), (set(new) - set(old), "after")):
        if missing:
            lines.append((3, f"{len(missing)} measurements only {side}"))
    lines.sort(key=lambda line: line[0])
    return [line for _, line in lines], lines[0][0] == 0


def _identity(record: Record) -> str:
    """A key that is equal for records of the same measurement."""
    detail = record["detail"]
    identity: dict[str, Any] = {key: record[key] for key in ("suite", "provider", "device", "dtype", "mode", "shape")}
    identity |= {key: detail.get(key) for key in ("budget_bytes", "model", "layout", "reduction", "variant", "cache")}
    identity["graph"] = record["method"] == "graph"
    if "kl" in detail:
        identity["kl"] = f"{detail['kl']:.1e}"
    if "budget_bytes" in detail:
        identity["shape"] = {**record["shape"], "B": None}
    return json.dumps(identity, sort_keys=True)


def _changes(old: Record, new: Record) -> list[tuple[bool, str]]:
    """(True if for the worse, description) of each change. The change of time comes first."""
    if old["status"] != new["status"]:
        return [(old["status"] == "ok", f"{old['status']} → {new['status']} {new['reason'] or ''}".strip())]
    found = []
    if old["median_ms"] is not None and new["median_ms"] is not None:
        found.append(_change_of_time(old, new))
    for key, what in (("peak_bytes", "peak"), ("saved_bytes", "saved")):
        a, b = old[key], new[key]
        if a is not None and b is not None and abs(b - a) > max(2**20, 0.05 * a):
            found.append((b > a, f"{what} {a / 2**20:.1f} → {b / 2**20:.1f} MiB"))
    for key, what in (("error_value", "loss error"), ("error_grad", "grad error")):
        a, b = old[key] or 0.0, new[key] or 0.0
        both = old[key] is not None and new[key] is not None
        if both and max(a, b) > 1e-6 and max(a, b) >= _ERROR_FACTOR * max(min(a, b), 1e-12):
            found.append((b > a, f"{what} {a:.0e} → {b:.0e}"))
    if "budget_bytes" in new["detail"] and old["shape"]["B"] != new["shape"]["B"]:
        found.append((new["shape"]["B"] < old["shape"]["B"], f"largest B {old['shape']['B']} → {new['shape']['B']}"))
    return found or [(False, "same")]


def _change_of_time(old: Record, new: Record) -> tuple[bool, str]:
    """(True if slower, description). Changes below the noise, the sum of both half 20–80 % ranges, do not count."""
    ratio = new["median_ms"] / old["median_ms"]
    noise = sum((r["p80_ms"] - r["p20_ms"]) / 2 / r["median_ms"] for r in (old, new))
    verdict = "slower" if ratio > 1 else "faster"
    if abs(math.log(ratio)) <= math.log1p(max(_MIN_CHANGE, noise)):
        verdict = "same time"
    times = f"{old['median_ms']:.4g} → {new['median_ms']:.4g} ms"
    return verdict == "slower", f"{verdict} {times} ({100 * (ratio - 1):+.1f} %, noise {100 * noise:.1f} %)"


def _measure_both(revision: str, run: list[str], rounds: int) -> tuple[Records, Records]:
    """Records of the revision and of the working tree. The benchmarks of the working tree measure both in turn."""
    if rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more, got {rounds}")
    with _package_of(revision) as base, tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "before.jsonl"), Path(folder, "after.jsonl")
        for _ in range(rounds):
            builds.measure(base, run, before, MINILM_KERNELS_REVISION=revision)
            builds.measure(builds.ROOT, run, after)
        return merged(read([before])), merged(read([after]))


@contextmanager
def _package_of(revision: str) -> Iterator[Path]:
    """A folder with the revision's `minilm_kernels`, built, and the `benchmarks` of the working tree."""
    git = ["git", "-C", builds.ROOT, "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        builds.call([*git, "add", "--detach", tree, revision], f"--base {revision}")
        try:
            yield builds.build(tree, Path(folder))
        finally:
            builds.call([*git, "remove", "--force", tree], "removing the worktree")


def merged(found: Records) -> Records:
    """One record per measurement, with the median of the rounds' medians and their widest quantiles."""
    made = []
    for _, rounds in groups(found, _identity):
        record = dict(rounds[-1])
        timed = [r for r in rounds if r["median_ms"] is not None]
        if timed:
            record["median_ms"] = statistics.median(r["median_ms"] for r in timed)
            record |= {"p20_ms": min(r["p20_ms"] for r in timed), "p80_ms": max(r["p80_ms"] for r in timed)}
        made.append(record)
    return made
