"""The whole demo with the real teacher and text for a few small steps, and its refused options."""

import json

import pytest

from examples.demo import assets, experiment
from examples.demo.__main__ import main
from examples.demo.markers import markers
from minilm_kernels.distill import DistillResult

BEGIN, END = markers("demo")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Short samples, few evaluation samples, few and short test texts."""
    settings = {"max_seq_length": 16, "total_batch_size": 4, "eval_samples": 8, "eval_steps": 4, "logging_steps": 1}
    monkeypatch.setattr(experiment, "SETTINGS", {**experiment.SETTINGS, **settings})
    found = assets.test_sets()
    kept = {}
    for name, file in found._asdict().items():
        kept[name] = tmp_path / file.name
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        short = [{key: value[:60] if isinstance(value, str) else value for key, value in row.items()} for row in rows]
        kept[name].write_text("\n".join(map(json.dumps, short[::10])), encoding="utf-8")
    monkeypatch.setattr(assets, "test_sets", lambda: found._replace(**kept))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_demo(tmp_path, capsys):
    output, readme = tmp_path / "out", tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\n{END}\n\ntail\n")
    arguments = ["--output-dir", str(output), "--max-steps", "6", "--seeds", "3", "--update", str(readme)]
    assert main(arguments) == 0
    record = json.loads((output / "evaluation" / "results.json").read_text())
    before, after, *_ = record["rows"]
    titles = ["before", "after, seed 3", "teacher", "static embeddings"]
    assert [row["model"] for row in record["rows"]] == titles
    assert after["scores"]["relation KL"][0] < before["scores"]["relation KL"][0]
    for row in record["rows"]:
        for name in ("topics", "similarity", "headlines"):
            value, low, high = row["scores"][name]
            assert low <= value <= high
    for file in ("loss.png", "evaluation/quality.png"):
        assert (output / file).read_bytes().startswith(b"\x89PNG")
    assert (output / "seed-3" / "student" / "model.safetensors").is_file()

    written = readme.read_text()
    assert written.startswith(f"# Title\n\n{BEGIN}\n|")
    assert written.endswith(f"{END}\n\ntail\n")
    assert "--seeds 3 --update README.md" in written
    assert str(tmp_path) not in written
    assert f"{output / 'seed-3' / 'student'}" in capsys.readouterr().out

    # Finished runs are used again, and other settings in the same folder are refused.
    assert main([*arguments, "--max-steps", "7"]) == 1
    assert "--max-steps" in capsys.readouterr().err


def test_test_sets_are_whole():
    found = assets.test_sets()
    rows = {
        name: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for name, file in found._asdict().items()
    }
    assert len(rows["topics"]) == 445
    assert len({row["label"] for row in rows["topics"]}) == 5
    assert len(rows["similarity"]) == 50 * 49 // 2
    assert all(0 <= row["score"] <= 1 for row in rows["similarity"])
    assert len(rows["headlines"]) == 279
    assert all(row["query"] and row["answer"] for row in rows["headlines"])


def test_evaluation_articles_are_not_trained_on_and_news_is_not_either():
    train, evaluation = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in assets.wikipedia_text()
    )
    assert len(train) > 80
    assert len(evaluation) >= 10
    assert not {row["title"] for row in train} & {row["title"] for row in evaluation}
    assert not {row["text"] for row in train} & {row["text"] for row in evaluation}
    paragraphs = {paragraph for row in train for paragraph in row["text"].split("\n\n")}
    assert len(paragraphs) > 4000
    news = [json.loads(line)["text"] for line in assets.test_sets().topics.read_text().splitlines()]
    assert not any(paragraphs.intersection(text.split("\n\n")) for text in news)


def test_a_stopped_run_ends_the_demo_with_the_signals_status(tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment, "distill", lambda config: DistillResult(None, tmp_path / "metrics.jsonl", 3, None, None, 15)
    )
    assert main(["--output-dir", str(tmp_path)]) == 128 + 15
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("options", [["--max-steps", "0"], ["--seeds", "1", "1"], ["--seeds", "-1"], ["--seeds"]])
def test_wrong_options_are_refused(tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main(["--output-dir", str(tmp_path / "out"), *options])
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_markers_stop_the_demo_before_any_work(tmp_path, capsys):
    (tmp_path / "README.md").write_text("# Title\n")
    assert main(["--output-dir", str(tmp_path / "out"), "--update", str(tmp_path / "README.md")]) == 1
    assert BEGIN in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
