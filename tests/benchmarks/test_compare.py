"""Verdicts account for noise; a revision is built and measured beside the working tree."""

import json
import shutil
import subprocess

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import compare
from benchmarks.measure import builds, records
from tests.benchmarks.test_report import BATCH, made


def record(median, spread=0.0, **changed):
    times = {"median_ms": median, "p20_ms": median * (1 - spread), "p80_ms": median * (1 + spread)}
    given = {**times, "peak_bytes": 2**24, "saved_bytes": 2**22, "error_value": 1e-5, "error_grad": 1e-5}
    return made("loss", "cpu", **given | changed)


OOM = made("loss", "cpu", status="oom", reason="too large")


@pytest.mark.parametrize(
    ("old", "new", "start", "worse"),
    [
        (record(10), record(10.2), "same time", False),
        (record(10), record(11), "slower", True),
        (record(10), record(9), "faster", False),
        (record(10, 0.06), record(11, 0.06), "same time", False),  # within the noise of both
        (record(10, 0.06), record(13, 0.06), "slower", True),
        (record(10), OOM, "ok → oom too large", True),
        (OOM, record(10), "oom → ok", False),
        (
            record(10),
            record(10, peak_bytes=2**25),
            "same time 10 → 10 ms (+0.0 %, noise 0.0 %); peak 16.0 → 32.0 MiB",
            True,
        ),
        (record(10), record(10, error_grad=1e-4), "same time 10 → 10 ms (+0.0 %, noise 0.0 %); grad error", True),
        (BATCH[0], {**BATCH[0], "shape": {**BATCH[0]["shape"], "B": 2}}, "largest B 3 → 2", True),
    ],
)
def test_verdicts(old, new, start, worse):
    (line,), found = compare.verdicts([old], [new])
    assert line.partition(": ")[2].startswith(start)
    assert found == worse


def test_worse_results_come_first_and_unmatched_ones_are_counted():
    other = made("loss", "torch", median_ms=1.0, p20_ms=1.0, p80_ms=1.0)
    lines, worse = compare.verdicts([record(10), other, BATCH[0]], [{**other, "median_ms": 2.0}, record(10), BATCH[1]])
    assert worse
    assert "slower" in lines[0]
    assert "torch" in lines[0]
    assert lines[-2:] == ["1 measurements only before", "1 measurements only after"]
    with pytest.raises(ValueError, match="in common"):
        compare.verdicts([record(10)], [other])


def test_files(tmp_path, capsys):
    for name, median in (("a", 10), ("b", 20)):
        records.append(tmp_path / name, record(median))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "slower 10 → 20 ms (+100.0 %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a")])


@pytest.mark.slow
def test_base(tmp_path, monkeypatch, capsys):
    """The base revision of a test repository computes twice the loss. The comparison reports this."""
    monkeypatch.setenv("MINILM_KERNELS_BUILD", "none")
    root = builds.ROOT
    repository = tmp_path / "repository"
    ignored = shutil.ignore_patterns("*.so", "*.missing", "__pycache__")
    for name in ("minilm_kernels", "build_support", "csrc"):
        shutil.copytree(root / name, repository / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, repository / name)
    file = repository / "minilm_kernels/relation/backends/blocked.py"
    right = file.read_text(encoding="utf-8")
    wrong = right.replace("values[r] += _deterministic_sum(", "values[r] += 2 * _deterministic_sum(")
    assert wrong != right
    file.write_text(wrong, encoding="utf-8")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "base"]):
        subprocess.run([*git, *words], check=True, timeout=600)
    file.write_text(right, encoding="utf-8")
    for name in ("benchmarks", "examples"):
        (repository / name).symlink_to(root / name)
    monkeypatch.setattr(builds, "ROOT", repository)
    run = "--device cpu --shapes 1x2x32x4x4 --providers torch --seconds 0.01 --threads 1"
    assert main(["compare", "--base", "HEAD", "--run", run, "--rounds", "1"]) == 0
    assert "loss torch float32 B=1 A=2 S=32 4/4 qq none full wall: wrong → ok" in capsys.readouterr().out
    listed = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True, timeout=600).stdout
    assert len(listed.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["compare", "--base", "nothing", "--run", run])
    assert "--base nothing failed" in capsys.readouterr().err


def test_rounds_are_merged():
    merged = compare.merged([record(10), record(14), record(11, 0.5)])
    assert len(merged) == 1
    assert (merged[0]["median_ms"], merged[0]["p20_ms"], merged[0]["p80_ms"]) == (11, 5.5, 16.5)
    assert json.dumps(merged)
