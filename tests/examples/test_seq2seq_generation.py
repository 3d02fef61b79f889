"""The example of a sequence-to-sequence student learns to reverse words."""

import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from minilm_kernels.distill import DistillConfig, distill
from tests.distill.tiny import WORDS, make_texts, save_model

SCRIPT = Path(__file__).parents[2] / "examples" / "seq2seq_generation.py"


@pytest.mark.slow
def test_a_student_with_the_prefix_mask_learns_to_reverse(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(make_texts(60)), encoding="utf-8")
    config = DistillConfig(
        teacher=str(save_model(tmp_path / "teacher")),
        text=(str(text),),
        output_dir=str(tmp_path / "run"),
        mask="prefix",
        student_num_hidden_layers=2,
        student_hidden_size=96,
        student_num_attention_heads=4,
        relation_heads=4,
        max_seq_length=32,
        total_batch_size=8,
        max_steps=10,
        device="cpu",
    )
    student = distill(config).student
    chance = random.Random(0)
    sources = [chance.choices(WORDS[:12], k=chance.randint(1, 4)) for _ in range(2000)]
    pairs = [{"source": " ".join(words), "target": " ".join(reversed(words))} for words in sources]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    words = [str(student), str(tmp_path / "pairs.jsonl"), str(tmp_path / "output")]
    options = ["--epochs", "20", "--learning-rate", "1e-3", "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, *options])
    capsys.readouterr()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    found = re.search(r"exact match ([\d.]+)", capsys.readouterr().out)
    assert found
    assert float(found[1]) >= 0.95
