"""Every wait of a test for a process or a thread has a limit."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("test_*.py")])
RUNS = {"run", "call", "check_call", "check_output"}
WAITS = {"communicate", "wait", "join", "result", "acquire"}


def without_limit(source: str) -> list[int]:
    """The line numbers of calls that may wait forever."""
    lines = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        words = {word.arg: word.value for word in call.keywords}
        if owner == "subprocess" and name in RUNS:
            waits = "timeout" not in words
        elif name == "spawn":
            waits = not (isinstance(words.get("join"), ast.Constant) and words["join"].value is False)
        else:
            waits = name in WAITS and not call.args and "timeout" not in words
        if waits:
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_waits_without_a_limit(file: Path) -> None:
    assert not without_limit(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("subprocess.run(['a'], check=True)", [1]),
        ("subprocess.run(['a'], timeout=1)", []),
        ("process.communicate()", [1]),
        ("process.communicate(timeout=1)", []),
        ("process.wait(1)", []),
        ("thread.join()", [1]),
        ("', '.join(names)", []),
        ("multiprocessing.spawn(work)", [1]),
        ("multiprocessing.spawn(work, join=True)", [1]),
        ("multiprocessing.spawn(work, join=False)", []),
        ("case.run('sum', 'cpu')", []),
    ],
)
def test_what_waits(source: str, found: list[int]) -> None:
    assert without_limit(source) == found


_HANGS = """
import ctypes, time

def test_in_python():
    time.sleep(600)

def test_in_c():
    library, mutex = ctypes.PyDLL(None), (ctypes.c_char * 256)()
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)  # forever, with Python's lock, so that no signal handler runs

def test_after_them():
    pass
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a mutex of zeros")
def test_a_test_that_hangs_is_ended_and_named(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(_HANGS, encoding="utf-8")
    short = ["-o", "timeout=3", "-o", "faulthandler_timeout=9"]
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, *short, "-n", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    result = subprocess.run(
        [*command, tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert "test_in_python - Failed: Timeout (>3.0s)" in result.stdout
    assert "test_in_c - worker 'gw0' crashed" in result.stdout
    assert "2 failed, 1 passed" in result.stdout
    assert "in test_in_c" in result.stderr
