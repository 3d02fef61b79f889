"""Speed of encoding texts, measured for all models in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from .encoders import Candidate

_ROUNDS = 5
_BATCH = 64


class Speed(NamedTuple):
    """Medians over the rounds.

    Attributes:
        milliseconds: time of encoding one text, from the string to its features.
        tokens_per_second: throughput in batches of 64 texts.
    """

    milliseconds: float
    tokens_per_second: float


def measure(candidates: Sequence[Candidate], tokens: int, seed: int = 0) -> list[Speed]:
    """Measures all models on the same texts, one after the other in each round, so that all see the same noise.

    Args:
        candidates: at least one of them is a transformers model; its tokenizer counts the tokens of all.
        tokens: tokens of each text.

    Raises:
        ValueError: there is no transformers model.
    """
    transformers = [one for one in candidates if one.source is not None]
    if not transformers:
        raise ValueError("the speed needs a transformers model, whose tokenizer counts the tokens")
    texts = _texts(transformers[0].encoder.tokenizer, tokens, seed)
    single: list[list[float]] = [[] for _ in candidates]
    batch: list[list[float]] = [[] for _ in candidates]
    for turn in tqdm(range(_ROUNDS + 1), "speed", leave=False, disable=None):
        for number, one in enumerate(candidates):
            times = _time(one, texts[:1]), _time(one, texts)
            if turn:  # the first round warms up
                single[number].append(times[0])
                batch[number].append(times[1])
    return [
        Speed(1000 * statistics.median(one), len(texts) * tokens / statistics.median(many))
        for one, many in zip(single, batch, strict=True)
    ]


def _texts(tokenizer: object, tokens: int, seed: int) -> list[str]:
    """Texts of random words, each of `tokens` tokens including the special ones."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalnum())  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(seed)
    count = max(1, tokens - tokenizer.num_special_tokens_to_add())  # type: ignore[attr-defined]
    chosen = torch.randint(len(words), (_BATCH, count), generator=generator)
    return [" ".join(words[k] for k in row) for row in chosen.tolist()]


def _time(candidate: Candidate, texts: Sequence[str]) -> float:
    begin = time.perf_counter()
    candidate.encoder.encode(list(texts), batch_size=_BATCH, show_progress_bar=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin
