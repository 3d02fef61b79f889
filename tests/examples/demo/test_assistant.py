"""The comparison of students with and without an assistant: equal numbers of steps, and its table."""

import json

import pytest

from examples.demo import assets, assistant
from minilm_kernels import distill
from minilm_kernels.evaluate import cli


def scores(*values):
    return {name: [value, value, value] for name, value in zip(("relation KL", "topics"), values, strict=True)}


def test_the_table_has_runs_and_means():
    rows = [
        {"model": "direct, seed 0", "scores": scores(0.2, 0.9)},
        {"model": "direct, seed 1", "scores": scores(0.4, 0.8)},
        {"model": "teacher", "scores": scores(0.0, 1.0)},
    ]
    assert assistant.format_table(rows).splitlines() == [
        "| distilled | relation KL | topics |",
        "| --- | ---: | ---: |",
        "| direct, seed 0 | 0.200 | 0.900 |",
        "| direct, seed 1 | 0.400 | 0.800 |",
        "| direct, mean | 0.300 | 0.850 |",
        "| teacher | 0.000 | 1.000 |",
    ]


def test_both_ways_have_equal_steps(monkeypatch, tmp_path):
    """The comparison itself, with stand-ins for training and evaluation."""
    for name, value in (
        ("minilm_l6", tmp_path),
        ("wikipedia_text", assets.WikipediaText(tmp_path / "train.jsonl", tmp_path / "eval.jsonl")),
        ("test_sets", assets.TestSets(*(tmp_path / f"{name}.jsonl" for name in assets.TestSets._fields))),
    ):
        monkeypatch.setattr(assets, name, lambda value=value: value)
    configs, evaluations = [], []

    def trained(config):
        configs.append(config)
        return distill.DistillResult(tmp_path, tmp_path / "metrics.jsonl", config.max_steps, None, None, None)

    def evaluated(words):
        options = cli.build_parser().parse_args(words)
        evaluations.append(options)
        options.output_dir.mkdir(parents=True)
        rows = [{"model": title, "scores": scores(0.5, 0.25)} for title in (*options.titles, "teacher")]
        (options.output_dir / "results.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
        return 0

    monkeypatch.setattr("minilm_kernels.distill.loop.distill", trained)
    monkeypatch.setattr(cli, "main", evaluated)
    page = tmp_path / "page.md"
    page.write_text("<!-- assistant:begin -->\n<!-- assistant:end -->\n", encoding="utf-8")
    words = ["--max-steps", "10", "--seeds", "3", "4", "--update", str(page), "--output-dir", str(tmp_path / "out")]
    assert assistant.main(words) == 0
    totals = [sum(each.max_steps for each in filter(None, (config, config.assistant()))) for config in configs]
    assert totals == [10] * 4
    assert [config.seed for config in configs] == [3, 4, 3, 4]
    assert {config.assistant().student_num_hidden_layers for config in configs[2:]} == {6}
    (options,) = evaluations
    assert options.titles == ["direct, seed 3", "direct, seed 4", "assistant, seed 3", "assistant, seed 4"]
    assert "| assistant, mean | 0.500 | 0.250 |" in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        assistant.main(["--max-steps", "9"])
