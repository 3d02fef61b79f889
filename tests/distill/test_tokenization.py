"""Tokenization of documents: special tokens, long documents, and documents that the tokenizer refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from minilm_kernels.distill import tokenization
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .streams import Documents, pieces, shards_of, stream
from .tiny import make_tokenizer


@pytest.mark.parametrize("form", ["[CLS] $A [SEP]", "$A [SEP]", "$A"])
def test_special_tokens_are_found(form: str) -> None:
    from tokenizers import processors

    inner: Callable[..., Any] = make_tokenizer()
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    found = DocumentTokenizer(inner)
    assert [*found.prefix, *found("w0 w1"), *found.suffix] == inner("w0 w1")["input_ids"]


def test_a_long_record_is_cut_into_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "LARGEST_DOCUMENT", 10)
    text = "w1 w2 w3 w4 w5 w6 " + "w7w8w9" * 4
    samples = stream([Documents([text])]).take(1)
    assert tokenization._pieces(text) == ["w1 w2 w3 ", "w4 w5 w6 ", "w7w8w9w7w8", "w9w7w8w9w7", "w8w9"]
    assert len(pieces(samples)) == 5


def test_documents_that_the_tokenizer_refuses_are_bad() -> None:
    class Panic(BaseException):
        """An error that is not an `Exception`, like a panic of tokenizers."""

    class Picky(DocumentTokenizer):
        def batch(self, texts: Sequence[str]) -> list[np.ndarray]:
            for text in texts:
                if "w13" in text:
                    raise Panic("w13")
                if "w17" in text:
                    raise TypeError("TextEncodeInput must be Union")
            return super().batch(texts)

    texts = ["w1 w2", "w3 w13", "w17", "w4"]
    said: list[str] = []
    tokenizer = Picky(make_tokenizer())
    shards = shards_of([Documents(texts)], tokenizer=tokenizer, said=said)
    assert [shards.read(document).tolist() for document in range(len(shards))] == [
        tokenizer("w1 w2").tolist(),
        tokenizer("w4").tolist(),
    ]
    assert (shards.counts.good, shards.counts.bad) == (2, 2)
    assert said == [
        "skipped a document: given, row 2: the tokenizer refuses it (Panic: w13)",
        "skipped a document: given, row 3: the tokenizer refuses it (TypeError: TextEncodeInput must be Union)",
    ]
