"""Preparation of token shards: the same bytes however they are made, interruptions, damage, and changes of the text."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from minilm_kernels.distill import DistillConfig, preparation, prepare
from minilm_kernels.distill.preparation import TokenFolder
from minilm_kernels.distill.run_folder import lock_folder
from minilm_kernels.distill.sources import HubDataset, Source, open_sources
from minilm_kernels.distill.token_shards import MANIFEST, TokenShards
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .streams import TOKENIZER, Documents, shards_of
from .tiny import make_texts, make_tokenizer


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SHARD_CHARACTERS", 300)


def content(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 of every file of a pattern, without the lock."""
    files = [path for path in folder.glob(pattern) if path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_of(shards: TokenShards) -> list[list[int]]:
    return [shards.read(document).tolist() for document in range(len(shards))]


def tokens_of(texts: list[Any]) -> list[list[int]]:
    return [TOKENIZER(text).tolist() for text in texts if isinstance(text, str) and text.strip()]


def text_lines(documents: list[Any]) -> bytes:
    return b"\n\n".join(b"w1 \xff w2" if text is ... else (text or "").encode() for text in documents)


def json_lines(documents: list[Any]) -> bytes:
    bad = '{"text": "w1 w2'
    return "\n".join(bad if text is ... else json.dumps({"text": text}) for text in documents).encode()


def json_array(documents: list[Any]) -> bytes:
    bad = '{"text": "w1 w2'
    return ("[" + ",\n".join(bad if text is ... else json.dumps({"text": text}) for text in documents) + "]").encode()


def csv_lines(documents: list[Any]) -> bytes:
    rows = [{None: '1,""', ...: '1,"w1 w2'}.get(text) or f'1,"{text}"' for text in documents]
    return "\n".join(["n,text", *rows, ""]).encode()


def parquet(documents: list[Any]) -> bytes:
    cells = [b"w1 \xff w2" if text is ... else text and text.encode() for text in documents]
    column = pa.array(cells)
    column = pa.Array.from_buffers(pa.string(), len(cells), column.buffers(), column.null_count)
    written = io.BytesIO()
    pq.write_table(pa.table({"text": column}), written, row_group_size=9)
    return written.getvalue()


FORMS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.txt": text_lines,
    "a.jsonl": json_lines,
    "a.jsonl.gz": lambda documents: gzip.compress(json_lines(documents), mtime=0),
    "a.json": json_array,
    "a.csv": csv_lines,
    "a.parquet": parquet,
}
GOOD = make_texts(60, seed=5, longest=12)
FIRST = make_texts(4, seed=6, longest=9)


def corpus(folder: Path, name: str, documents: list[Any]) -> list[Source]:
    """Two files, of which the second contains the documents."""
    folder.mkdir(exist_ok=True)
    (folder / "A.txt").write_text("\n\n".join(FIRST))
    (folder / name).write_bytes(FORMS[name](documents))
    return open_sources([str(folder / "A.txt"), str(folder / name)])


@pytest.mark.parametrize("at", [0, 14, 60], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", FORMS)
def test_shards_have_the_good_documents(name: str, at: int, tmp_path: Path) -> None:
    """Bad documents and nulls never change the tokens, regardless of their position and of an interruption."""
    documents = [*GOOD[:at], ..., None, *GOOD[at:]]
    sources = corpus(tmp_path / "text", name, documents)
    said: list[str] = []
    shards = shards_of(sources, said=said, folder=tmp_path / "whole")
    assert documents_of(shards) == tokens_of(FIRST + GOOD)
    assert len(list((tmp_path / "whole").glob("shard-*"))) >= 3
    nulls = 0 if name in ("a.txt", "a.csv") else 1
    found = shards.counts
    assert (found.good, found.bad, found.nulls) == (64 + (name == "a.csv"), 1, nulls)
    line = {"a.txt": 2 * at + 1, "a.json": at + 1, "a.csv": at + 2}.get(name, at + 1)
    row = f"row {line}: not UTF-8" if name == "a.parquet" else f"line {line}"
    assert len(said) == 1
    assert f"skipped a document: {tmp_path / 'text' / name}, {row}" in said[0]

    # Any finished shards are kept, and the others are made with the same bytes.
    expected = content(tmp_path / "whole")
    names = sorted(path for path in expected if path.startswith("shard-"))
    for kept in (set(names[:1]), set(names[1:]), set(names[::2])):
        for path in (tmp_path / "whole").iterdir():
            if path.name.startswith("shard-") and path.name not in kept:
                path.unlink()
        (tmp_path / "whole" / MANIFEST).unlink()
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "whole").glob("shard-*")}
        again = shards_of(sources, folder=tmp_path / "whole")
        assert content(tmp_path / "whole") == expected
        assert again.counts == found
        assert before == {path: (tmp_path / "whole" / path).stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("name", FORMS)
def test_a_preparation_that_a_bad_document_stopped_continues_after_the_repair(name: str, tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    sources = corpus(tmp_path / "text", name, [*GOOD[:30], ..., *GOOD[30:]])
    message = rf"{name}, (line|row) \d+.*--bad-documents skip.*run the same command again"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            shards_of(sources, "error", folder=target)
    assert not (target / MANIFEST).exists()
    skipped = shards_of(sources, "skip", folder=target)
    assert documents_of(skipped) == tokens_of(FIRST + GOOD)
    assert TokenFolder(target, sources, TOKENIZER, {}).difference() == ""
    assert TokenFolder(target, sources, TOKENIZER, {}).difference(strict=True) is None
    with pytest.raises(ValueError, match=message):  # the shard that lacks a document is made again
        shards_of(sources, "error", folder=target)
    repaired = corpus(tmp_path / "text", name, [*GOOD[:30], "w1 w2", *GOOD[30:]])
    shards = shards_of(repaired, "error", folder=target)
    assert documents_of(shards) == tokens_of([*FIRST, *GOOD[:30], "w1 w2", *GOOD[30:]])


def test_processes_make_the_same_bytes(tmp_path: Path) -> None:
    texts = [*make_texts(200), ..., None, "", "w1 ünï\u2028cödé 漢字 😀", "  "]
    sources = corpus(tmp_path / "text", "a.jsonl", texts)
    counts = shards_of(sources, folder=tmp_path / "one").counts
    for processes in (2, 3):
        said: list[str] = []
        shards = shards_of(sources, said=said, folder=tmp_path / str(processes), processes=processes)
        assert content(tmp_path / str(processes)) == content(tmp_path / "one")
        assert shards.counts == counts
        assert len(said) == 1
    assert counts.documents == len(tokens_of(FIRST + texts))


def test_a_killed_preparation_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL ends a preparation in three processes at random moments, at the latest after 20 more shards."""
    (tmp_path / "text.txt").write_text("\n\n".join(make_texts(200)))
    sources = open_sources([str(tmp_path / "text.txt")])
    expected = content(shards_of(sources, folder=tmp_path / "whole").folder)
    target = tmp_path / "killed"
    chance = random.Random(0)
    kept: list[dict[str, str]] = [{}]
    while MANIFEST not in kept[-1]:
        known, ended = len(kept[-1]), 0
        if not (child := os.fork()):
            try:
                steps = TokenFolder(target, sources, TOKENIZER, {}).prepare(preparation.BadDocuments(), 2)
                for number, _ in enumerate(steps):
                    if number == known + 20:
                        signal.pause()
            finally:
                os._exit(0)
        while len(list(target.glob("shard-*"))) == known and not ended:
            time.sleep(0.001)
            ended, _ = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(chance.random() * 0.03)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        # Processes that tokenize may still be ending: their unfinished files come and go.
        kept.append(content(target, "shard-*") | content(target, MANIFEST))
        assert kept[-2].items() <= kept[-1].items() <= expected.items()
        assert not ended or MANIFEST in kept[-1]
    assert len(kept) > 2  # killed at least once
    shards_of(sources, folder=target)
    assert content(target) == expected


def test_a_change_of_text_tokenizer_or_settings_is_seen(tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    sources = corpus(tmp_path / "text", "a.jsonl", GOOD)
    assert TokenFolder(target, sources, TOKENIZER, {}).difference() is None
    shards_of(sources, folder=target)

    def difference(sources: list[Source], tokenizer: DocumentTokenizer = TOKENIZER, **settings: str) -> str | None:
        return TokenFolder(target, sources, tokenizer, settings).difference()

    assert difference(sources) == ""
    for path in (tmp_path / "text").iterdir():  # another date, the same content
        os.utime(path, ns=(1, 1))
    assert difference(sources) == ""
    changed = [GOOD[0].replace("w", "w", 1)[::-1][::-1], *GOOD[1:]]
    assert difference(corpus(tmp_path / "text", "a.jsonl", changed)) == ""
    other = GOOD[1].replace(GOOD[1][:2], "w9" if GOOD[1][:2] != "w9" else "w8", 1)
    assert difference(corpus(tmp_path / "text", "a.jsonl", [GOOD[0], other, *GOOD[2:]])) == "a.jsonl differs"
    assert difference(corpus(tmp_path / "text", "a.jsonl", [*GOOD, "w1"])) == "a.jsonl differs"
    renamed = corpus(tmp_path / "other", "a.csv", GOOD)
    assert difference(renamed) == "missing: a.jsonl, new: a.csv"
    assert difference([*sources, sources[0]]) == "its files have another order or number"
    assert difference(sources, DocumentTokenizer(make_tokenizer(["w1", "w2"]))) == "another tokenizer"
    changed_setting = TokenFolder(target, sources, TOKENIZER, {"--documents": "line"})
    assert changed_setting.difference() == "--documents: None before, line now"
    limited = TokenFolder(target, sources, TOKENIZER, {}, most_documents=5)
    assert limited.difference() == "--max-train-documents: None before, 5 now"
    # The folder is made anew.
    shards = shards_of(renamed, folder=target)
    assert documents_of(shards) == tokens_of(FIRST + GOOD)
    assert content(target) == content(shards_of(renamed, folder=tmp_path / "fresh").folder)


def test_a_data_set_of_the_hub_is_prepared_and_continued(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part in range(2):
        pq.write_table(pa.table({"text": GOOD[part::2]}), tmp_path / "set" / f"train-{part}.parquet")
    source = HubDataset(str(tmp_path / "set"), None, "train", "text")
    shards = shards_of([source], folder=tmp_path / "tokens")
    assert documents_of(shards) == tokens_of(GOOD[::2] + GOOD[1::2])
    expected = content(tmp_path / "tokens")
    (tmp_path / "tokens" / MANIFEST).unlink()
    (tmp_path / "tokens" / "shard-000001.safetensors").unlink()
    shards_of([source], folder=tmp_path / "tokens")
    assert content(tmp_path / "tokens").keys() == expected.keys()
    assert documents_of(TokenShards(tmp_path / "tokens")) == documents_of(shards)
    limited = shards_of([source], most_documents=7)
    assert documents_of(limited) == tokens_of(GOOD[:14:2])
    assert TokenFolder(tmp_path / "tokens", [source], TOKENIZER, {}).difference() == ""


def test_text_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    sources = corpus(tmp_path / "text", "a.jsonl", GOOD)
    target = TokenFolder(tmp_path / "tokens", sources, TOKENIZER, {})
    steps = target.prepare(preparation.BadDocuments())
    next(steps)
    corpus(tmp_path / "text", "a.jsonl", [*GOOD, "w1"])
    with pytest.raises(ValueError, match=r"the text has changed while it was read: .*a\.jsonl"):
        list(steps)
    assert not (tmp_path / "tokens" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["shard-000001.safetensors", "starts.npy", "digests.npy", MANIFEST])
def test_damage_is_reported(name: str, tmp_path: Path) -> None:
    folder = shards_of([Documents(GOOD)], folder=tmp_path / "tokens").folder
    file = folder / name
    right = file.read_bytes()
    file.write_bytes(right[:-1])
    with pytest.raises(ValueError, match=r"the token shards in .*tokens are damaged: .*prepare them again"):
        TokenShards(folder).verify()
    if name != MANIFEST:
        file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"damaged: {name} has a wrong checksum"):
            TokenShards(folder).verify()
        file.unlink()
        with pytest.raises(ValueError, match=rf"damaged: .*{name}"):
            TokenShards(folder)
    else:
        for wrong in (
            "[]",
            '{"format": 2}',
            "{",
            json.dumps({**json.loads(right), "counts": {}, "files": {"../x": {}}}),
        ):
            file.write_text(wrong)
            with pytest.raises(ValueError, match="damaged"):
                TokenShards(folder)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"no complete token shards.*minilm-distill prepare"):
            TokenShards(folder)
    file.write_bytes(right)
    TokenShards(folder).verify()


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = shards_of([Documents(GOOD)], folder=tmp_path / "tokens").folder
    np.save(folder / "starts.npy", np.array([print, None], object))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["starts.npy"]["bytes"] = (folder / "starts.npy").stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"damaged: .*Python objects"):
        TokenShards(folder)


def test_a_damaged_shard_of_an_interrupted_preparation_is_made_again(tmp_path: Path) -> None:
    sources = [Documents(GOOD)]
    folder = shards_of(sources, folder=tmp_path / "tokens").folder
    expected = content(folder)
    (folder / MANIFEST).unlink()
    (folder / "shard-000001.safetensors").write_bytes(b"\0" * 100)
    shards_of(sources, folder=folder)
    assert content(folder) == expected


def test_continuing_reads_from_the_last_finished_shard(tmp_path: Path) -> None:
    source = Documents(make_texts(100))
    folder = shards_of([source], folder=tmp_path / "tokens").folder
    (folder / MANIFEST).unlink()
    last = max(folder.glob("shard-*"))
    last.unlink()
    source.began.clear()
    shards_of([source], folder=folder)
    assert max(cursor or 0 for cursor in source.began) > 60
    assert source.began.count(None) <= 1


def test_one_preparation_at_a_time(tmp_path: Path) -> None:
    sources = [Documents(GOOD)]
    (tmp_path / "tokens").mkdir()
    with lock_folder(tmp_path / "tokens"), pytest.raises(RuntimeError, match=r"another process is running in .*tokens"):
        shards_of(sources, folder=tmp_path / "tokens")
    first = TokenFolder(tmp_path / "tokens", sources, TOKENIZER, {}).prepare(preparation.BadDocuments())
    next(first)
    with pytest.raises(RuntimeError, match=rf"another process is running in .*process {os.getpid()}"):
        shards_of(sources, folder=tmp_path / "tokens")
    assert len(list(first)) >= 2
    assert documents_of(TokenShards(tmp_path / "tokens")) == tokens_of(GOOD)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output-dir: .* has other files \(thesis\.txt\); choose an empty"):
        shards_of([Documents(GOOD)], folder=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_documents_of_every_size(tmp_path: Path) -> None:
    """Empty documents, a huge line without end, and a limit on the number of documents."""
    (tmp_path / "line.txt").write_text("w1 " * 500_000)
    shards = shards_of(open_sources([str(tmp_path / "line.txt")]))
    assert shards.counts.tokens == 500_000
    assert len(shards) == 2  # a document has at most 1 MiB
    texts = ["w1", "", " \n ", *make_texts(50)]
    for count in (1, 3, 4, 20, 53, 60):
        limited = shards_of([Documents(texts[:2]), Documents(texts[2:], "b")], most_documents=count)
        assert documents_of(limited) == tokens_of(texts[:count])
        assert limited.counts.read == min(count, 53)
    assert shards_of([Documents(["w1 w2"])]).token_counts(9) == {6: 1, 7: 1}


def test_ids_above_16_bits_are_kept() -> None:
    words = [f"x{i}" for i in range(70_000)]
    tokenizer = DocumentTokenizer(make_tokenizer(words))
    shards = shards_of([Documents(["x0 x69999", "x65530 x65531"])], tokenizer=tokenizer)
    assert [shards.read(i).tolist() for i in range(2)] == [[5, 70_004], [65_535, 65_536]]
    assert load_file(shards.folder / "shard-000000.safetensors")["tokens"].dtype == np.uint32
    small = shards_of([Documents(["w1"])])
    assert load_file(small.folder / "shard-000000.safetensors")["tokens"].dtype == np.uint16


def test_two_runs_read_a_folder_that_nobody_can_write(
    settings: Callable[..., DistillConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minilm_kernels.distill import cli, distill

    whole = distill(settings(output_dir=tmp_path / "whole"))
    config = settings()
    tokens = tmp_path / "tokens"
    capsys.readouterr()
    words = ["--teacher", config.teacher, "--text", *config.text, "--output-dir", str(tokens)]
    assert cli.main(["prepare", *words]) == 0
    said = capsys.readouterr().out
    assert said == f"minilm-distill: {tokens} has 300 documents, 9198 tokens\n"
    assert len(prepare(DistillConfig.from_mapping({**_options(words), "copy_layers": "1"}))) == 300  # nothing to do
    before = content(tokens)
    for path in (*tokens.iterdir(), tokens):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        results = [
            distill(settings(text=(), tokens=tokens, output_dir=tmp_path / name, max_train_documents=None))
            for name in ("one", "two")
        ]
    finally:
        tokens.chmod(0o755)
    assert content(tokens) == before
    for result in results:
        assert result.student is not None
        assert whole.student is not None
        weights = (result.student / "model.safetensors").read_bytes()
        assert weights == (whole.student / "model.safetensors").read_bytes()

    status = cli.main(["prepare", *words, "--documents", "line"])
    assert status == 1
    assert "--documents: paragraph before, line now); choose another folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exactly one of --text, --dataset-name and --tokens"):
        settings(tokens=tokens)
    with pytest.raises(ValueError, match="--max-train-documents belongs to --text"):
        settings(text=(), tokens=tokens, max_train_documents=4)


def _options(words: list[str]) -> dict[str, str]:
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def test_tokens_of_another_tokenizer_are_refused(settings: Callable[..., DistillConfig], tmp_path: Path) -> None:
    from minilm_kernels.distill import distill

    tokenizer = DocumentTokenizer(make_tokenizer([f"v{i}" for i in range(60)]))
    folder = shards_of([Documents(["v1 v2"] * 9)], tokenizer=tokenizer, folder=tmp_path / "tokens").folder
    with pytest.raises(ValueError, match=r"--tokens: .*tokens has the tokens of another tokenizer"):
        distill(settings(text=(), tokens=folder))
