"""`minilm-evaluate` from its options to its files."""

import json
from pathlib import Path

import pytest

from minilm_kernels.evaluate.cli import main
from tests.distill.tiny import WORDS, make_texts


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """One file of each kind."""
    texts = make_texts(60, longest=12)
    rows = {
        "topics": [{"text": f"{'w1' if k % 2 else 'w2'} {text}", "label": k % 2} for k, text in enumerate(texts)],
        "similar": [
            {"sentence1": a, "sentence2": b, "score": len(a)} for a, b in zip(texts[9:], texts[:-9], strict=True)
        ],
        "answers": [{"query": text, "answer": f"{text} {WORDS[k]}"} for k, text in enumerate(texts[:20])],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "eval.txt").write_text("\n\n".join(make_texts(20, seed=5)), encoding="utf-8")
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows} | {"text": str(tmp_path / "eval.txt")}


@pytest.mark.slow
def test_whole_comparison(
    tmp_path: Path, model: Path, other: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = [str(other), "--titles", "student", "--teacher", str(model), "--static", "--output-dir", str(output)]
    words += ["--text", files["text"], "--relation-heads", "12", "--max-seq-length", "32", "--classification"]
    words += [files["topics"], "--pairs", files["similar"], "--retrieval", files["answers"], "--device", "cpu"]
    assert main([*words, "--fine-tune", "--learning-rates", "1e-3", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((output / "results.json").read_text(encoding="utf-8"))
    student, teacher, static = record["rows"]
    assert [row["model"] for row in record["rows"]] == ["student", "teacher", "static embeddings"]
    assert teacher["scores"]["relation KL"][0] == pytest.approx(0, abs=1e-6)
    value, low, high = student["scores"]["relation KL"]
    assert 0.01 < low <= value <= high
    assert "relation KL" not in static["scores"]
    assert set(student["scores"]) == {"relation KL", "topics", "similar", "answers", "topics, fine-tuned"}
    assert any("not fine-tuned" in note for note in static["notes"])
    for row in record["rows"]:
        assert row["tokens_per_second"] > 0
        assert 0 <= row["scores"]["answers"][0] <= 1
    table = (output / "results.md").read_text(encoding="utf-8")
    assert table in printed
    assert len(table.splitlines()) == 2 + len(record["rows"])
    assert (output / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_student_of_a_run_and_a_model_that_does_not_fit(
    tmp_path: Path, model: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from minilm_kernels.distill import DistillConfig, distill

    (tmp_path / "train.txt").write_text("\n\n".join(make_texts(20, seed=6)), encoding="utf-8")
    run = DistillConfig(
        teacher=str(model),
        copy_layers=(2,),
        text=(str(tmp_path / "train.txt"),),
        eval_text=(files["text"],),
        output_dir=str(tmp_path / "run"),
        relation_heads=12,
        max_seq_length=32,
        total_batch_size=2,
        max_steps=2,
        device="cpu",
    )
    result = distill(run)
    capsys.readouterr()
    settings = str(tmp_path / "run" / "settings.json")
    words = [str(tmp_path / "run"), "--teacher", str(model), "--text", files["text"], "--distill-config", settings]
    assert main([*words, "--no-speed", "--output-dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["rows"]
    # The same samples and the same formula as in the run's own evaluation, but other batches.
    assert rows[0]["scores"]["relation KL"][0] == pytest.approx(result.eval_after["eval_loss"], rel=1e-4)

    words = [str(tmp_path / "run"), "--teacher", str(model), "--text", files["text"], "--relation-heads", "5"]
    words += ["--max-seq-length", "32"]
    assert main([*words, "--no-speed", "--output-dir", str(tmp_path / "misfit"), "--device", "cpu"]) == 0
    assert "--relation-heads 5 does not divide the hidden sizes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--text", "a.txt"], "--text: the relation KL needs --teacher"),
        (["m", "--static"], "--static: static embeddings are made of --teacher"),
        (["m", "--titles", "a", "b"], "--titles: expected one for each of 1 models, got 2"),
        (["m", "--tasks", "wnli"], "--tasks: unknown wnli; expected one of cola"),
        (["m", "--fine-tune"], "--fine-tune: it needs files of --classification"),
        (["m", "--no-speed"], "no test: give files, or --tasks"),
        (["m", "--seeds", "1", "1"], "--seeds: expected distinct numbers"),
        (["m", "--seeds", "-1"], "--seeds: expected 0 or more"),
        (["m", "--max-seq-length", "1"], "--max-seq-length: expected 2 or more, got 1"),
        (["m", "--pairs", "x/a.csv", "y/a.csv"], "two test files have the same name"),
        (["m", "--xnli-languages", "xx"], "--xnli-languages: unknown xx"),
    ],
)
def test_contradictions_are_told_before_torch_is_imported(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_file_is_an_error_without_a_traceback(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--classification", "nowhere.csv"]) == 1
    assert capsys.readouterr().err == "minilm-evaluate: error: --classification: there is no file nowhere.csv\n"


def test_missing_model_is_an_error(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["./no/such/model", "--pairs", files["similar"]]) == 1
    assert "no folder ./no/such/model" in capsys.readouterr().err
