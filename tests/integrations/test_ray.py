"""The example of Ray Train: two workers, of which one is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from minilm_kernels.distill import DistillConfig, distill
from tests.distill.conftest import short_run
from tests.distill.tiny import make_texts, save_model
from tests.processes import PATIENCE, wait_for_step

ROOT = Path(__file__).parents[2]


def test_workers_go_on_after_a_killed_one(tmp_path: Path) -> None:
    """The main process, which has locked the folder, is killed. The bits are those of one process."""
    teacher, text = save_model(tmp_path / "teacher"), tmp_path / "text.txt"
    text.write_text("\n\n".join(make_texts(200)), encoding="utf-8")

    def settings(name: str, **changes: object) -> DistillConfig:
        plan = {"total_batch_size": 2, "dropout": 0.1, "max_steps": 200, "save_steps": 5, "eval_steps": 100}
        return short_run(teacher, text, tmp_path / name, **plan, **changes)

    distill(settings("whole", micro_batch_size=1))
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(settings("run").as_dict()), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with subprocess.Popen(
        [sys.executable, ROOT / "examples" / "ray_train.py", "2", file],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            wait_for_step(tmp_path / "run" / "metrics.jsonl", 20, process)
            found = re.search(r"process (\d+)", (tmp_path / "run" / ".lock").read_text())
            assert found
            os.kill(int(found[1]), signal.SIGKILL)
            said = process.communicate(timeout=PATIENCE)[0]
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, said
    assert "continuing after step" in said
    one, two = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "whole"))
    assert all(two[name].equal(tensor) for name, tensor in one.items())
