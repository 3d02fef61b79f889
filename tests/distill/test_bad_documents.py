"""Bad documents: warnings, counts, and corpora with too many of them."""

from __future__ import annotations

import pytest

from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.sources import Document

from .streams import Documents, stream
from .tiny import make_texts


def test_nearly_all_bad_documents_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 of the first 3 documents cannot be read"):
        stream([Documents([..., ..., ...])]).take(1)
    with pytest.raises(ValueError, match=r"10 of the first 11 documents cannot be read"):
        stream([Documents(["w1", *[...] * 10])]).take(5)
    stream([Documents(["w1 w2", *[...] * 9])]).take(5)
    stream([Documents(["w1 w2", *[None] * 99, ...])]).take(5)
    endless = Documents(["w1 w2", *[...] * 100_000])
    said: list[str] = []
    with pytest.raises(
        ValueError, match=r"cannot be read; check the text and --text-column\. The latest: given, row \d+: is bad"
    ):
        stream([endless], said=said).take(1)
    assert len(said) < 30
    # A bad first file does not stop the run.
    stream([Documents([...] * 900), Documents(make_texts(300))]).take(300)


def test_warnings_are_limited_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    said: list[str] = []
    found = BadDocuments("skip", said.append)
    for number in range(1000):
        found.note(1, [Document(None, f"row {number}", None, "bad")], 2)
    assert (found.bad, found.nulls) == (1000, 2000)
    assert len(said) == 20
    clock[0] += 31
    found.note(1, [Document(None, "row 1000", None, "bad", documents=5)], 0)
    assert said[20:] == ["skipped a document: row 1000: bad (and 980 others since the last warning)"]
    assert found.listed() == " (1005 bad, 2000 without text (null))"
