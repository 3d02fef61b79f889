"""A few trials of soak.py. `make soak` runs many more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.distill.soak"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_a_run_survives_a_kill_at_a_few_operations() -> None:
    options = ["--keep", "1", "--resume-too", "--damage", "--every", "60", "--seconds", "600"]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=850, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = int(done.stdout.split()[-1])
    assert f"survived {tried} of {tried}" in done.stdout
    assert tried >= 8
