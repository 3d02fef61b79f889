"""Tokenizes documents without special tokens, and finds the special tokens that surround a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from .sources import LARGEST_DOCUMENT, Document

Tokens = np.ndarray  # (tokens,) int32
CHECKED_DOCUMENTS, CHECKED_CHARACTERS = 256, 1 << 18  # the first documents of the text, up to these limits
# In a language that the tokenizer knows, a few per cent of the tokens are unknown; in another language, nearly all.
MOST_UNKNOWN = 0.5
# A tokenizer without an unknown token drops unknown words, so that it returns few tokens. A known text never has this
# many characters per token.
MOST_CHARACTERS_A_TOKEN = 64


class DocumentTokenizer:
    """Tokenizes texts without special tokens.

    Args:
        tokenizer: a tokenizer of transformers.

    Attributes:
        prefix, suffix: the special tokens before and after a text, (tokens,) int32.
        pad: id of the padding token, 0 if there is none.
        unknown: id of the unknown token, if there is one.

    Raises:
        ValueError: the special tokens cannot be separated from the tokens of the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        body = self("a")
        whole = np.asarray(tokenizer("a", verbose=False)["input_ids"], np.int32)
        if not len(body):
            raise ValueError("the tokenizer returns no token for 'a', so its special tokens cannot be determined")
        offsets = [i for i in range(len(whole)) if np.array_equal(whole[i : i + len(body)], body)]
        if not offsets:
            raise ValueError("the tokenizer changes the tokens of the text when it adds special tokens")
        self.prefix, self.suffix = whole[: offsets[0]], whole[offsets[0] + len(body) :]
        self.pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.unknown: int | None = tokenizer.unk_token_id

    def __call__(self, text: str) -> Tokens:
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Token ids of each text."""
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]

    def documents(self, documents: Sequence[Document]) -> tuple[list[list[Tokens]], list[Document]]:
        """Tokenizes documents that have text.

        Returns:
            The token ids of each document, with several entries for a long one and none for one that the tokenizer
            refuses, and the documents that it refuses.
        """
        pieces = [_pieces(document.text or "") for document in documents]
        try:
            tokens = iter(self.batch([piece for parts in pieces for piece in parts]))
            return [list(islice(tokens, len(parts))) for parts in pieces], []
        except BaseException as error:  # a panic in a Rust tokenizer is not an Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            if len(documents) == 1:
                problem = f"the tokenizer refuses it ({type(error).__name__}: {error})"
                return [[]], [documents[0]._replace(text=None, problem=problem)]
        found: list[list[Tokens]] = []
        refused: list[Document] = []
        for document in documents:
            good, bad = self.documents([document])
            found += good
            refused += bad
        return found, refused

    def digest(self) -> str:
        """SHA-256 of everything on which the tokens depend: the vocabulary, its rules, and the special tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules = {} if backend is None else json.loads(backend.to_str())
        for state in ("version", "truncation", "padding"):  # depends on the file format and on earlier calls
            rules.pop(state, None)
        special = [self.prefix.tolist(), self.suffix.tolist(), self.pad, self.unknown]
        content = [sorted(self._tokenizer.get_vocab().items()), rules or type(self._tokenizer).__name__, special]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(self._tokenizer.get_vocab().values())


def _pieces(text: str) -> list[str]:
    """Splits text into pieces of at most `LARGEST_DOCUMENT` characters, at spaces where possible."""
    pieces = []
    while len(text) > LARGEST_DOCUMENT:
        cut = text.rfind(" ", 0, LARGEST_DOCUMENT) + 1 or LARGEST_DOCUMENT
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def check_tokenizer(tokenizer: DocumentTokenizer, texts: Iterable[str]) -> list[int]:
    """Tokenizes the first documents.

    Args:
        texts: the documents, of which a few are read.

    Returns:
        All token ids.

    Raises:
        ValueError: the tokenizer does not know most of the words.
    """
    first = list(_first(texts))
    if not first:
        return []
    ids = [int(i) for tokens in tokenizer.batch(first) for i in tokens]
    characters = sum(len("".join(text.split())) for text in first)
    if len(ids) * MOST_CHARACTERS_A_TOKEN < characters:
        raise ValueError(
            f"--teacher: its tokenizer returns {len(ids)} tokens for the first {characters} characters of the text: it "
            "does not know this language"
        )
    strange = ids.count(tokenizer.unknown) if tokenizer.unknown is not None else 0
    if strange > MOST_UNKNOWN * len(ids):
        raise ValueError(
            f"--teacher: its tokenizer does not know the text: {strange} of the first {len(ids)} tokens are its "
            "unknown token; check that the tokenizer belongs to the model, and that the model knows this language"
        )
    return ids


def _first(texts: Iterable[str]) -> Iterator[str]:
    room = CHECKED_CHARACTERS
    for text in islice(texts, CHECKED_DOCUMENTS):
        yield text[:room]
        room -= len(text)
        if room <= 0:
            return
