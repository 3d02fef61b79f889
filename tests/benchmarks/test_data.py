"""Measurements of the input pipeline: the loop has the same losses on data that is ready, and no token is wrong."""

import subprocess
import sys

import pytest

from benchmarks.measure import corpus, preparation
from minilm_kernels.distill import DistillConfig, prepare
from minilm_kernels.distill.tokenization import DocumentTokenizer
from tests.benchmarks.test_run import by_provider, run


def test_text_repeats_after_its_unique_part(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNIQUE", 30_000)
    corpus.write(tmp_path / "text.txt", 500_000, 200)
    text = (tmp_path / "text.txt").read_text()
    assert 500_000 <= len(text) < 800_000
    documents = text.strip().split("\n\n")
    unique = len(set(documents))
    assert sum(map(len, documents[:unique])) > 30_000
    assert len(documents) > unique
    assert documents[unique : 2 * unique] == documents[:unique][: len(documents) - unique]


def test_memory_counts_children():
    program = "import subprocess, sys; x = b'1' * (64 << 20); print(flush=True); sys.stdin.read()"
    outer = (
        "import subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {program!r}], stdin=subprocess.PIPE); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            found = preparation.tree_bytes(process.pid)
        finally:
            process.kill()
    assert 64 * 2**20 < found < 200 * 2**20
    assert preparation.tree_bytes(process.pid) == 0


def test_a_preparation_may_say_much(monkeypatch):
    said = "import sys; sys.stderr.write('x' * 200_000); print('y' * 200_000); "
    monkeypatch.setattr(preparation, "_PREPARE", said + "print([1, 2, 3])")
    assert preparation.preparation({})[0] == preparation.Speed(1, 2, 3)
    monkeypatch.setattr(preparation, "_PREPARE", said + "sys.exit(3)")
    with pytest.raises(RuntimeError, match="ended with 3: x"):
        preparation.preparation({})


def test_wrong_tokens_are_counted(tmp_path):
    made = corpus.tokenizer(200)
    for name in ("teacher", "run"):
        (tmp_path / name).mkdir()
    made.save_pretrained(tmp_path / "teacher")
    file = tmp_path / "text.txt"
    corpus.write(file, 20_000, 200)
    shards = prepare(
        DistillConfig(
            teacher=str(tmp_path / "teacher"), copy_layers=(1,), text=[str(file)], output_dir=str(tmp_path / "run")
        )
    )
    assert preparation.wrong_tokens(shards, DocumentTokenizer(made), file, 20) == 0
    assert preparation.wrong_tokens(shards, DocumentTokenizer(corpus.tokenizer(210)), file, 20) > 0.9
    speed = preparation.reading_speed(shards, DocumentTokenizer(made), 64, 5)
    assert 0.5 * 5 * 64 < speed.tokens <= 5 * 64
    assert speed.seconds > 0


@pytest.mark.slow
def test_records(tmp_path):
    settings = ("--shapes", "tiny:2x64", "--rounds", "2", "--text", "1MiB")
    found = by_provider(run(tmp_path, "--suite", "data", *settings))
    assert list(found) == ["loop", "tokenizer", "prepare", "reading"]
    assert {record["status"] for record in found.values()} == {"ok"}
    assert all(record["error_value"] == record["error_grad"] == 0 for record in found.values())
    loop = found["loop"]["detail"]
    assert loop["overhead"] == pytest.approx(loop["best_ms"] / loop["prepared_ms"] - 1)
    assert found["prepare"]["peak_bytes"] > 100 * 2**20
    assert found["prepare"]["detail"]["text_bytes"] >= 2**20
