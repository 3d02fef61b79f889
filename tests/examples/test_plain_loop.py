"""The example of a plain loop, in a few steps on a tiny model."""

import re
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForMaskedLM, BertConfig

from tests.distill.tiny import LAYERS, SIZES, make_texts, make_tokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    teacher = AutoModelForMaskedLM.from_config(BertConfig(**SIZES, **LAYERS | {"num_hidden_layers": 4}))
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    for saved in (teacher, make_tokenizer()):
        saved.save_pretrained(tmp_path / "teacher")
    (tmp_path / "text").write_text("\n".join(make_texts(80, longest=20)), encoding="utf-8")
    words = [str(tmp_path / name) for name in ("teacher", "text", "output")]
    options = ["--relation-heads", "4", "--max-steps", "20", "--batch-size", "8", "--learning-rate", "1e-3"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = re.search(r"eval KL ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert found
    before, after = map(float, found.groups())
    assert 0 < after < before
    assert AutoModel.from_pretrained(tmp_path / "output").config.num_hidden_layers == 2
