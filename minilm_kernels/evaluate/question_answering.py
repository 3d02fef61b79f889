"""Extractive question answering with unanswerable questions, as in SQuAD 2.0: inputs, predictions and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from datasets import Dataset

_LONGEST_ANSWER = 30  # tokens


def tokenize(rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_tokens: int) -> dict[str, list[Any]]:
    """Turns questions and contexts into inputs; a long context gives several.

    The positions of an answer are those of its first and last token. An input without the answer points to token 0.

    Args:
        rows: columns `question`, `context` and `answers` (`text`, `answer_start`); an empty list of answers marks an
            unanswerable question.

    Returns:
        The model's inputs, `start_positions`, `end_positions`, `example` (number of the question), and `offsets`: the
        characters of each token of the context, (-1, -1) for all others.
    """
    inputs = tokenizer(
        [question.strip() for question in rows["question"]],
        list(rows["context"]),
        truncation="only_second",
        max_length=max_tokens,
        stride=max_tokens // 3,  # tokens that two parts of a long context share: 128 of 384
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    example = inputs.pop("overflow_to_sample_mapping")
    found = inputs.pop("offset_mapping")
    offsets = [
        [pair if side == 1 else (-1, -1) for pair, side in zip(found[k], inputs.sequence_ids(k), strict=True)]
        for k in range(len(example))
    ]
    positions = [_answer_tokens(rows["answers"][n], offsets[k]) for k, n in enumerate(example)]
    return {
        **inputs,
        "start_positions": [start for start, _ in positions],
        "end_positions": [end for _, end in positions],
        "example": example,
        "offsets": offsets,
    }


def _answer_tokens(answers: Mapping[str, Sequence[Any]], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) if this part of the context does not contain it."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    touched = [k for k, (first, last) in enumerate(offsets) if first < end and last > begin]
    context = [pair for pair in offsets if pair[0] >= 0]
    if not touched or context[0][0] > begin or context[-1][1] < end:
        return 0, 0
    return touched[0], touched[-1]


def answers(
    start: numpy.ndarray, end: numpy.ndarray, inputs: Mapping[str, Sequence[Any]], contexts: Sequence[str]
) -> list[str]:
    """The best answer of each question; "" where no answer has a higher score than token 0.

    Args:
        start, end: logits, (inputs, tokens).
        inputs: from `tokenize`.
        contexts: the context of each question.
    """
    best = [(-numpy.inf, "")] * len(contexts)
    none = numpy.full(len(contexts), numpy.inf)
    for k, number in enumerate(inputs["example"]):
        offsets = numpy.asarray(inputs["offsets"][k])
        tokens = numpy.flatnonzero(offsets[:, 0] >= 0)
        none[number] = min(none[number], start[k, 0] + end[k, 0])
        if not len(tokens):
            continue
        scores = start[k, tokens][:, None] + end[k, tokens][None, :]
        valid = numpy.triu(numpy.ones_like(scores, dtype=bool)) & ~numpy.triu(
            numpy.ones_like(scores, dtype=bool), _LONGEST_ANSWER
        )
        first, last = numpy.unravel_index(numpy.where(valid, scores, -numpy.inf).argmax(), scores.shape)
        if scores[first, last] > best[number][0]:
            text = contexts[number][offsets[tokens[first], 0] : offsets[tokens[last], 1]]
            best[number] = (scores[first, last], text)
    return [text if score > lowest else "" for (score, text), lowest in zip(best, none, strict=True)]


def metrics(predicted: Sequence[str], rows: Dataset) -> dict[str, float]:
    """Exact match and F1 over the words, 0 to 1, by torchmetrics. An unanswerable question expects ""."""
    from torchmetrics.functional.text import squad

    found = squad(
        [{"prediction_text": text, "id": str(k)} for k, text in enumerate(predicted)],
        [
            {"answers": {"text": list(given["text"]) or [""], "answer_start": [0]}, "id": str(k)}
            for k, given in enumerate(rows["answers"])
        ],
    )
    return {"exact_match": float(found["exact_match"]) / 100, "f1": float(found["f1"]) / 100}
