"""Questions and answers to tokens and back."""

from typing import Any

import numpy
import pytest
from datasets import Dataset

from minilm_kernels.evaluate import question_answering as qa
from tests.distill.tiny import make_tokenizer

CONTEXT = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10"


def rows(*answers: str) -> dict[str, list[Any]]:
    found = [{"text": [a], "answer_start": [CONTEXT.index(a)]} if a else {"text": [], "answer_start": []}
             for a in answers]  # fmt: skip
    return {"question": [" w11 w12"] * len(answers), "context": [CONTEXT] * len(answers), "answers": found}


def test_positions_of_an_answer_give_its_text() -> None:
    found = qa.tokenize(rows("w3 w4", "w10", "", "w1"), make_tokenizer(), 40)
    assert found["example"] == [0, 1, 2, 3]
    for k, answer in enumerate(("w3 w4", "w10", "", "w1")):
        start, end = found["start_positions"][k], found["end_positions"][k]
        if not answer:
            assert (start, end) == (0, 0)
        else:
            assert CONTEXT[found["offsets"][k][start][0] : found["offsets"][k][end][1]] == answer


def test_long_contexts_give_overlapping_parts() -> None:
    found = qa.tokenize(rows("w9"), make_tokenizer(), 10)  # 5 tokens of the context a part
    assert len(found["example"]) > 2
    answered = [k for k, start in enumerate(found["start_positions"]) if start]
    assert answered, "no part has the answer"
    for k, offsets in enumerate(found["offsets"]):
        held = any(CONTEXT[a:b] == "w9" for a, b in offsets if a >= 0)
        assert (k in answered) == held


def logits(found: dict[str, list[Any]], spans: list[tuple[int, int]], height: float) -> tuple[Any, Any]:
    shape = (len(found["example"]), len(found["input_ids"][0]))
    start, end = numpy.zeros(shape), numpy.zeros(shape)
    for k, (first, last) in enumerate(spans):
        start[k, first] = end[k, last] = height
    return start, end


def test_best_span_and_no_answer() -> None:
    found = qa.tokenize(rows("w3 w4", "w3 w4"), make_tokenizer(), 40)
    span = found["start_positions"][0], found["end_positions"][0]
    start, end = logits(found, [span, span], 5.0)
    start[1, 0] = end[1, 0] = 9.0  # token 0 wins
    assert qa.answers(start, end, found, [CONTEXT, CONTEXT]) == ["w3 w4", ""]


def test_span_never_ends_before_it_begins_or_is_in_the_question() -> None:
    found = qa.tokenize(rows("w3"), make_tokenizer(), 40)
    start, end = logits(found, [(8, 6)], 5.0)
    start[0, 1] = end[0, 2] = 100.0  # the question
    answer = qa.answers(start, end, found, [CONTEXT])[0]
    assert answer in CONTEXT
    assert answer


def test_metrics_count_unanswerable_questions() -> None:
    given = Dataset.from_dict(rows("w3 w4", "", "w1", ""))
    found = qa.metrics(["w3 w5", "", "w1", "w2"], given)
    assert found == pytest.approx({"exact_match": 2 / 4, "f1": (0.5 + 1 + 1 + 0) / 4})
