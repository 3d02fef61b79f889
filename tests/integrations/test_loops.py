"""The examples of Accelerate, Lightning and FSDP2: they train, and their averages are exact."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.distill.tiny import make_texts, make_tokenizer
from tests.integrations.run_loop import SIZES
from tests.integrations.tiny import make

ROOT = Path(__file__).parents[2]
# One step over all rows: as one batch, as micro-batches of different sizes, and in two processes.
ONE_PROCESS = [
    ("accelerate_loop", "whole", {"steps": 1, "batch_size": 80, "parts": 1}),
    ("accelerate_loop", "parts", {"steps": 1, "batch_size": 30, "parts": 3}),
    ("lightning_module", "whole", {"steps": 1, "micro_batch": 16}),
    ("lightning_module", "parts", {"steps": 1, "micro_batch": 6}),
    ("fsdp2_loop", "whole", {"epochs": 1, "batch_size": 16}),
    ("accelerate_loop", "trained", {"steps": 40, "parts": 1}),
    ("lightning_module", "trained", {"steps": 40}),
    ("fsdp2_loop", "trained", {"epochs": 5}),
]
TWO_PROCESSES = [
    ("accelerate_loop", "two", {"steps": 1, "batch_size": 20, "parts": 2}),
    ("lightning_module", "two", {"steps": 1, "micro_batch": 5}),
    ("fsdp2_loop", "two", {"epochs": 1, "batch_size": 8}),
]


def launch(processes: int, *arguments: str | Path) -> str:
    """Runs a module under torchrun and returns what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=arguments[1],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with the students, and what each example printed in one process."""
    folder = tmp_path_factory.mktemp("loops")
    make("bert", "masked-lm", layers=4).save_pretrained(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    for name, rows in (("short", 16), ("long", 320)):
        texts = make_texts(64 + rows, longest=20)  # 64 are held out
        (folder / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    output = launch(1, "tests.integrations.run_loop", folder, json.dumps(ONE_PROCESS))
    launch(2, "tests.integrations.run_loop", folder, json.dumps(TWO_PROCESSES))
    _, *parts = re.split(r"^\[(.*)\]$", output, flags=re.MULTILINE)
    return folder, dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize(
    ("name", "output"), [run[:2] for run in ONE_PROCESS + TWO_PROCESSES if run[1] in ("parts", "two")]
)
def test_micro_batches_and_processes_have_the_gradient_of_one_batch(runs, name, output):
    folder, _ = runs
    found, whole = (load_file(folder / f"{name}-{end}" / "model.safetensors") for end in (output, "whole"))
    expected = torch.cat([x.flatten() for x in whole.values()])
    found = torch.cat([found[key].flatten() for key in whole])  # FSDP2 also saves the decoder's tied weight
    largest = expected.abs().max().item()
    assert largest > 4  # the step, not the initial weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("name", sorted({run[0] for run in ONE_PROCESS}))
def test_example_lowers_the_kl(runs, name):
    folder, printed = runs
    lines = re.findall("eval.KL.*|eval_kl.*|KL.*", printed[f"{name} trained"])
    before, *_, after = map(float, re.findall(r"\d\.\d+", " ".join(lines)))
    assert after < 0.95 * before
    assert AutoModel.from_pretrained(folder / f"{name}-trained").config.hidden_size == SIZES["width"]
