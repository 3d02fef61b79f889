"""The comparison of students with and without an assistant: its loss and its table."""

import json
import math

import pytest
import torch

from examples.demo import assistant
from minilm_kernels.students import student_config
from tests.distill.tiny import make_model, make_texts, make_tokenizer


def dense_loss(teacher, student, heads: int, tokens: torch.Tensor) -> float:
    """Loss of MiniLM for one sequence, in float64: KL of Q-K plus KL of V-V, a mean over heads and rows."""

    def relations(model) -> list[torch.Tensor]:
        hidden = model.double().eval()(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
        attention = model.encoder.layer[-1].attention.self
        q, k, v = (
            linear(hidden)[0].unflatten(1, (heads, -1)).transpose(0, 1)
            for linear in (attention.query, attention.key, attention.value)
        )
        return [(x @ y.mT / math.sqrt(x.shape[-1])).log_softmax(-1) for x, y in ((q, k), (v, v))]

    with torch.no_grad():
        pairs = zip(relations(teacher), relations(student), strict=True)
        return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs)


def test_the_loss_is_that_of_the_formula(monkeypatch):
    monkeypatch.setattr(assistant, "HEADS", 4)
    monkeypatch.setitem(assistant.SETTINGS, "max_seq_length", 32)
    teacher, tokenizer, texts = make_model("bert"), make_tokenizer(), make_texts(5, longest=50)
    student = type(teacher)(student_config(teacher.config, 1, 24, num_attention_heads=4))
    found = assistant.relation_kl(teacher, student, tokenizer, texts, batch_size=2)
    encoded = [tokenizer(text, truncation=True, max_length=32, return_tensors="pt")["input_ids"] for text in texts]
    assert {x.shape[1] for x in encoded} != {32}  # some are padded in their batch
    expected = sum(dense_loss(teacher, student, 4, tokens) for tokens in encoded) / len(texts)
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_table_has_runs_and_means():
    figures = [dict(zip(assistant.COLUMNS, values, strict=True)) for values in ((0.2, 0.9, 0.5), (0.4, 0.8, 0.6))]
    rows = [("direct", "0", "8", figures[0]), ("direct", "1", "8", figures[1]), ("teacher", "", "", figures[0])]
    lines = assistant.format_table(rows).splitlines()
    assert lines[0] == "| distilled | seed | steps | eval relation KL | BBC accuracy | Lee r |"
    assert lines[3:] == [
        "| direct | 1 | 8 | 0.400 | 0.800 | 0.600 |",
        "| direct | mean | 8 | 0.300 | 0.850 | 0.550 |",
        "| teacher |  |  | 0.200 | 0.900 | 0.500 |",
    ]


def test_both_ways_have_equal_steps(monkeypatch, tmp_path):
    """The comparison itself, with a stand-in for training."""
    from examples.demo import assets, probes
    from minilm_kernels import distill
    from tests.distill.tiny import save_model

    folder = save_model(tmp_path / "teacher")
    article = json.dumps({"text": make_texts(1)[0]})
    (tmp_path / "eval.jsonl").write_text(article + "\n", encoding="utf-8")
    text = assets.WikipediaText(tmp_path / "train.jsonl", tmp_path / "eval.jsonl")
    for name, value in (("minilm_l6", folder), ("wikipedia_text", text), ("bbc_news", None), ("lee_similarity", None)):
        monkeypatch.setattr(assets, name, lambda value=value: value)
    monkeypatch.setattr(probes, "probe", lambda *_: {"bbc_accuracy": 0.5, "lee_r": 0.25})
    monkeypatch.setattr(assistant, "HEADS", 4)
    monkeypatch.setitem(assistant.SETTINGS, "max_seq_length", 32)
    configs = []

    def trained(config):
        configs.append(config)
        return distill.DistillResult(folder, tmp_path / "metrics.jsonl", config.max_steps, None, None, None)

    monkeypatch.setattr("minilm_kernels.distill.loop.distill", trained)
    page = tmp_path / "page.md"
    page.write_text("<!-- assistant:begin -->\n<!-- assistant:end -->\n", encoding="utf-8")
    assert assistant.main(["--max-steps", "10", "--seeds", "3", "4", "--update", str(page)]) == 0
    totals = [sum(each.max_steps for each in filter(None, (config, config.assistant()))) for config in configs]
    assert totals == [10] * 4
    assert [config.seed for config in configs] == [3, 4, 3, 4]
    assert {config.assistant().student_num_hidden_layers for config in configs[2:]} == {6}
    table = page.read_text(encoding="utf-8")
    assert "| assistant | 4 | 5 + 5 | 0.000 | 0.500 | 0.250 |" in table  # the student is the teacher itself
    with pytest.raises(SystemExit):
        assistant.main(["--max-steps", "9"])
