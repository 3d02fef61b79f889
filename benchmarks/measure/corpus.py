"""Synthetic text with documents of known lengths, and a WordPiece tokenizer for it.

A word is five letters, or five and a suffix of three. No other entry of the vocabulary is a prefix of a word, so that a
word has exactly one or two tokens. Word frequencies follow Zipf's law.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MEAN, SIGMA = 300, 0.6  # tokens of a document before the cut, and sigma of their logarithm
_SHORTEST, LONGEST = 8, 510  # tokens after the cut
UNIQUE = 1 << 25  # bytes of text after which it repeats
_SUFFIXES = 500
_SHARE = 0.3  # words with a suffix


def document_lengths(count: int, seed: int = 0) -> np.ndarray:
    """(count,) tokens of documents, without special tokens: log-normal with mean `MEAN`, cut at `LONGEST`."""
    normal = np.random.default_rng((seed, 0)).standard_normal(count)
    return np.clip(np.rint(MEAN * np.exp(SIGMA * normal - SIGMA**2 / 2)), _SHORTEST, LONGEST).astype(int)


@cache
def _words(length: int, count: int) -> np.ndarray:
    """(count,) different random words."""
    numbers = np.random.default_rng((length, 1)).choice(26**length, count, replace=False)
    letters = np.array(list(string.ascii_lowercase))
    return np.array(["".join(letters[number // 26 ** np.arange(length) % 26]) for number in numbers])


def tokenizer(vocabulary: int) -> Any:
    """A fast tokenizer of transformers with BERT's normalization, splitting, WordPiece and special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    suffixes = min(_SUFFIXES, vocabulary // 4)
    words = [*SPECIAL, *(f"##{x}" for x in _words(3, suffixes)), *_words(5, vocabulary - suffixes - len(SPECIAL))]
    made = Tokenizer(models.WordPiece({str(word): i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def documents(lengths: np.ndarray, vocabulary: int, seed: int = 0) -> Iterator[str]:
    """A text of each of these numbers of tokens, without special tokens."""
    suffixes = min(_SUFFIXES, vocabulary // 4)
    words, endings = _words(5, vocabulary - suffixes - len(SPECIAL)), _words(3, suffixes)
    share = 1 / np.arange(1, len(words) + 1)
    edges = np.cumsum(share / share.sum())
    generator = np.random.default_rng((seed, 1))
    for length in lengths:
        # One uniform number chooses each token; a token that becomes a suffix joins the word before it.
        chosen = np.minimum(np.searchsorted(edges, generator.random(length)), len(words) - 1)
        joined = np.flatnonzero(generator.random(length) < _SHARE)
        joined = joined[(joined > 0) & ~np.isin(joined - 1, joined)]
        text = (" " + words[chosen].astype(object)).astype(object)
        text[joined] = endings[chosen[joined] % len(endings)]
        yield "".join(text)[1:]


def write(file: Path, size: int, vocabulary: int) -> None:
    """Writes documents, separated by blank lines: `size` bytes or a little more, of which `UNIQUE` do not repeat."""
    parts: list[str] = []
    written, number = 0, 0
    with file.open("w", encoding="ascii") as out:
        while written < size:
            if written < UNIQUE:
                found = documents(document_lengths(64, number), vocabulary, number)
                parts.append("".join(f"{text}\n\n" for text in found))
            written += out.write(parts[number % len(parts)])
            number += 1
