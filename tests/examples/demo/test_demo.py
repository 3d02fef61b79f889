"""The whole demo with the real teacher and text for a few small steps, and its refused options."""

import json

import pytest

from examples.demo import assets, experiment
from examples.demo.__main__ import main
from examples.demo.markers import markers
from minilm_kernels.distill import DistillResult

BEGIN, END = markers("demo")


@pytest.fixture
def small(monkeypatch):
    """Short samples, few evaluation samples, few probe texts."""
    settings = {"max_seq_length": 16, "total_batch_size": 4, "eval_samples": 8, "eval_steps": 4, "logging_steps": 1}
    monkeypatch.setattr(experiment, "SETTINGS", {**experiment.SETTINGS, **settings})
    news, rated = assets.bbc_news(), assets.lee_similarity()
    assert len(news.texts) == len(news.labels) == 2225
    assert len(set(news.labels)) == 5
    assert rated.similarity.shape == (50, 50)
    assert (rated.similarity == rated.similarity.T).all()
    assert (rated.similarity.diagonal() == 1).all()
    words = [" ".join(text.split()[:12]) for text in news.texts[::150]]
    monkeypatch.setattr(assets, "bbc_news", lambda: assets.LabelledTexts(words, news.labels[::150]))
    short = [" ".join(text.split()[:12]) for text in rated.documents[:8]]
    monkeypatch.setattr(assets, "lee_similarity", lambda: assets.RatedDocuments(short, rated.similarity[:8, :8]))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_demo(tmp_path, capsys):
    output, readme = tmp_path / "out", tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\n{END}\n\ntail\n")
    arguments = ["--output-dir", str(output), "--max-steps", "6", "--seeds", "3", "--update", str(readme)]
    assert main(arguments) == 0
    record = json.loads((output / "results.json").read_text())
    before, after, teacher = record["rows"]
    assert [row["model"] for row in record["rows"]] == ["before", "after, seed 3", "teacher"]
    assert after["eval_kl"] < before["eval_kl"]
    assert after["eval_kl"] == pytest.approx(sum(after[f"eval_kl_{name}"] for name in ("qq", "kk", "vv")))
    assert after["seed"] == 3
    assert after["training_seconds"] > 0
    assert len({before["lee_r"], after["lee_r"], teacher["lee_r"]}) == 3
    assert record["settings"]["max_steps"] == 6
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "seed-3" / "student" / "model.safetensors").is_file()

    written = readme.read_text()
    assert written.startswith(f"# Title\n\n{BEGIN}\n|")
    assert written.endswith(f"{END}\n\ntail\n")
    assert f"{after['lee_r']:.3f}" in written
    assert "--seeds 3 --update README.md" in written
    assert str(tmp_path) not in written
    assert f"{output / 'seed-3' / 'student'}" in capsys.readouterr().out

    # Finished results are used again, and other settings in the same folder are refused.
    assert main(arguments) == 0
    assert json.loads((output / "results.json").read_text()) == record
    assert main([*arguments, "--max-steps", "7"]) == 1
    assert "--max-steps" in capsys.readouterr().err


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
    assert not any(paragraphs.intersection(text.split("\n\n")) for text in assets.bbc_news().texts)


def test_a_stopped_run_ends_the_demo_with_the_signals_status(tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment, "distill", lambda config: DistillResult(None, tmp_path / "metrics.jsonl", 3, None, None, 15)
    )
    assert main(["--output-dir", str(tmp_path)]) == 128 + 15
    assert not (tmp_path / "results.json").exists()


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
