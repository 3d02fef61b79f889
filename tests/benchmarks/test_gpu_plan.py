"""The plan for a GPU, rehearsed without one: on a stand-in device, from a tree without git, with every step failing."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import plan
from benchmarks.measure import builds, records
from benchmarks.suites import variants
from tests.benchmarks.test_report import ALL

STEPS = plan.load("gpu").steps
PARTS = plan.load("gpu").parts
_SKIP_TO_PROGRAM = '#!/bin/sh\nwhile [ "${1##*/}" = "$1" ]; do shift; done\nexec "$@"\n'


@pytest.fixture
def day(tmp_path, monkeypatch):
    """`day(*arguments, failing=...)` runs the plan with commands that write a record each, in no time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan._Run, "_has", lambda self, need: need != "ncu")
    monkeypatch.setattr(records, "revision", lambda: "one")
    monkeypatch.setenv("MINILM_KERNELS_REVISION", "")
    monkeypatch.setattr(plan.sections, "page", lambda found: "tables")
    out = tmp_path / "out"

    def run(*arguments: str, failing: str = "", how: int | None = 1) -> tuple[int, list[str]]:
        ran = []

        def call(words, output, end, environment):
            step = Path(output.name).stem.removeprefix("gpu-")
            ran.append(step)
            output.write("the output of a command\n")
            output.flush()
            records.append(Path(output.name).with_suffix(".jsonl"), ALL[0])
            return how if step == failing else 0

        monkeypatch.setattr(plan, "_call", call)
        return main(["gpu", "--out", str(out), *arguments]), list(dict.fromkeys(ran))

    return run


def _outcomes(text: str) -> dict[str, str]:
    """The line of each step. Lines of records come later."""
    return {line.split()[0]: line for line in reversed(text.splitlines()) if line.strip() and line[0] != " "}


@pytest.mark.parametrize("failing", [step.name for step in STEPS])
def test_every_step_may_fail(day, failing, capsys, tmp_path):
    skipped = {step.name for step in STEPS if "ncu" in step.needs}
    status, ran = day(failing=failing)
    assert ran == [step.name for step in STEPS if step.name not in skipped]
    assert status == (failing not in skipped)
    found = _outcomes(capsys.readouterr().out)
    for step in STEPS:
        expected = "skipped: ncu not installed" if step.name in skipped else "done"
        assert f" {expected if step.name != failing or step.name in skipped else 'failed'}" in found[step.name]
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"summary.txt", "state.json", *(f"gpu-{name}.jsonl" for name in ran)} <= names


def test_a_later_run_continues(day, monkeypatch, capsys):
    part = [step for step in STEPS if step.part == "correctness"]
    names = [step.name for step in part]
    always = [step.name for step in part if step.always]
    assert day("--part", "correctness", failing="smoke", how=None) == (0, names)
    assert "smoke          stopped" in capsys.readouterr().out
    assert day("--part", "correctness") == (0, [*always, "smoke"])
    assert "device-tests   done in an earlier run" in capsys.readouterr().out
    assert day("--part", "correctness")[1] == always
    assert day("--part", "correctness", "--restart")[1] == names
    assert day("--only", "smoke")[1] == ["smoke"]
    monkeypatch.setattr(records, "revision", lambda: "two")
    assert day("--part", "correctness")[1] == names


def test_parts_fit_one_command_of_ten_minutes():
    assert PARTS == ["correctness", "speed", "record"]
    for part in PARTS:
        assert sum(step.seconds for step in STEPS if step.part == part) == 60 * plan.load("gpu").minutes == 540
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_a_broken_report_loses_nothing(day, monkeypatch, capsys):
    monkeypatch.setattr(plan.sections, "page", lambda found: 1 / 0)
    assert day("--part", "record")[0] == 1
    assert "tables and plots: failed: ZeroDivisionError" in capsys.readouterr().out


def test_a_damaged_state_is_no_state(day, tmp_path):
    assert day("--part", "record")[0] == 0
    (tmp_path / "out/state.json").write_text("{", encoding="utf-8")
    assert len(day("--part", "record")[1]) == len([step for step in STEPS if step.part == "record"])


def test_the_archive_has_a_limit(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "b"):
        (out / f"gpu-{name}.jsonl").write_bytes(os.urandom(9 * 2**20))
        (out / f"gpu-{name}.log").write_bytes(b"first line" + os.urandom(2**20))
    (out / "summary.txt").write_text("all", encoding="utf-8")
    plan.pack(out, tmp_path / "made/day.tar.gz")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["day.tar.gz"]
    assert (tmp_path / "made/day.tar.gz").stat().st_size <= 16 * 2**20
    with tarfile.open(tmp_path / "made/day.tar.gz") as archive:
        sizes = {Path(entry.name).name: entry.size for entry in archive}
    assert sizes["summary.txt"] == 3
    assert sizes["gpu-a.jsonl"] == 9 * 2**20
    assert sum(sizes.values()) == plan.ARCHIVE_BYTES


def test_a_program_that_does_not_exist_fails_its_step(tmp_path):
    with (tmp_path / "log").open("w") as output:
        assert plan._call(["no-such-program"], output, 1e9, {"PATH": ""}) == 127
    assert "no-such-program" in (tmp_path / "log").read_text()


def test_words_of_commands():
    file = Path("/rows")
    words = plan._words("ncu --set full run --suite launches", "gpu", file)
    assert words[:3] == ["ncu", "--set", "full"]
    assert words[3:8] == [sys.executable, "-m", "benchmarks", "run", "--suite"]
    assert words[-4:] == ["--device", "cuda", "--out", "/rows"]
    assert plan._words("python -m pytest", "gpu", file) == [sys.executable, "-m", "pytest"]


def test_sources_without_git_have_a_revision(monkeypatch):
    monkeypatch.delenv("MINILM_KERNELS_REVISION", raising=False)
    monkeypatch.setenv("PATH", "")
    records.revision.cache_clear()
    try:
        assert records.revision().startswith("sources-")
    finally:
        records.revision.cache_clear()


@pytest.mark.parametrize("variant", variants.load(), ids=lambda variant: variant.name)
def test_variants_change_the_sources(variant, tmp_path, monkeypatch):
    """A pattern that no longer matches must be adapted in plans/variants.toml."""
    monkeypatch.setattr(builds, "call", lambda command, what, **options: None)
    variant.build(tmp_path)
    if variant.file:
        assert (tmp_path / variant.file).read_text() != (builds.ROOT / variant.file).read_text()


_NOISE = """
_exact = forward_reduced
def forward_reduced(*given):
    value, grads = _exact(*given)
    return value * (1 + 1e-6 * torch.rand(())), grads
"""


@pytest.mark.slow
def test_variants_take_turns_and_other_bits_are_wrong(monkeypatch, tmp_path):
    blocked = "minilm_kernels/relation/backends/blocked.py"
    tried = [
        variants.Variant("unchanged", "torch"),
        variants.Variant("noise", "torch", blocked, r"\Z", _NOISE),
        variants.Variant("crash", "torch", blocked, r"\Z", "import os; os._exit(3)"),
        variants.Variant("no match", "torch", blocked, "no such text", ""),
    ]
    monkeypatch.setattr(variants, "load", lambda: tried)
    file = tmp_path / "rows.jsonl"
    command = ["run", "--suite", "variants", "--device", "cpu", "--providers", "torch", "--seconds", "0.1"]
    assert main([*command, "--repeat", "3", "--out", str(file)]) == 0
    found = {r["detail"]["variant"]: r for r in records.read([file])}
    assert found["unchanged"]["status"] == "ok"
    assert found["unchanged"]["runs"] >= 5
    assert found["noise"]["status"] == "wrong"
    assert found["noise"]["detail"]["different"] > 0  # the noise may round to equal bits
    assert found["noise"]["median_ms"] is None
    assert "ended with 3" in found["crash"]["reason"]
    assert "has 0 matches" in found["no match"]["reason"]


@pytest.mark.slow
def test_the_build_step_needs_a_compiler_only(tmp_path):
    builds.copy_sources(tmp_path)
    command = [sys.executable, "build_support/native.py", "cuda"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    assert (tmp_path / "minilm_kernels/_cuda.abi3.so").exists()
    environment = os.environ | {"CXX": "no-such-compiler"}
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert failed.returncode == 1
    assert "the cuda library was not built: no C++ compiler was found" in failed.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_plan_on_a_stand_in_device(tmp_path):
    """From an unpacked tree, without git, pytest and C++ compiler, which stand-ins replace."""
    tree, bin_folder, site = tmp_path / "tree", tmp_path / "bin", tmp_path / "site"
    builds.copy_sources(tree)
    for name in ("benchmarks", "examples"):
        shutil.copytree(builds.ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (bin_folder, site):
        folder.mkdir()
    for program in ("sh", "env", "true"):
        (bin_folder / program).symlink_to(shutil.which(program))
    programs = {"ncu": _SKIP_TO_PROGRAM, "compute-sanitizer": _SKIP_TO_PROGRAM}
    programs["nvidia-smi"] = "#!/bin/sh\necho 1980, 2619, 40, 300.0\n"
    for name, text in programs.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    shutil.copy(Path(__file__).with_name("stand_in.py"), site / "sitecustomize.py")
    for module in ("pytest", "xdist"):
        (site / f"{module}.py").write_text("print('no tests on a stand-in')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MINILM_KERNELS")}
    environment |= {"PATH": str(bin_folder), "PYTHONPATH": f"{site}:{tree}", "CXX": "true"}
    command = [sys.executable, "-m", "benchmarks", "gpu", "--minutes", "60", "--archive", str(tmp_path / "day.tar.gz")]
    ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=1700)
    logs = "".join(f"\n== {log.name}\n{log.read_text()[-600:]}" for log in (tree / "gpu-results").glob("*.log"))
    assert ended.returncode == 0, ended.stdout + logs
    outcomes = _outcomes(ended.stdout)
    assert all(" done in " in outcomes[step.name] for step in STEPS), ended.stdout
    found = records.read([tree / "gpu-results"])
    assert {r["suite"] for r in found} >= {
        "loss",
        "memory",
        "train_step",
        "inference",
        "accuracy",
        "variants",
        "first_call",
    }
    by_status = {status: [r for r in found if r["status"] == status] for status in ("wrong", "failed")}
    assert not any(by_status.values()), json.dumps(by_status)[:3000]
    timed = {r["detail"]["variant"] for r in found if r["suite"] == "variants" and r["median_ms"] is not None}
    assert timed == {"cuda", "cuda, 8 warps", "triton", "triton, 1 stage"}
    assert all(r["revision"].startswith("sources-") for r in found)
    assert (tmp_path / "day.tar.gz").stat().st_size < 16 * 2**20
