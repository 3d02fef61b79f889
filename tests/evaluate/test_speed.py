"""Texts of the speed measurement, and its figures."""

from pathlib import Path

import pytest
import torch

from minilm_kernels.evaluate import speed
from minilm_kernels.evaluate.encoders import load_candidate


def test_texts_have_the_wanted_number_of_tokens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_ROUNDS", 1)
    monkeypatch.setattr(speed, "_BATCH", 3)
    one = load_candidate(str(model), "one", torch.device("cpu"), 20)
    seen: list[list[int]] = []
    encode = one.encoder.encode

    def recorded(texts: list[str], **options: object) -> object:
        seen.append([len(one.encoder.tokenizer(text)["input_ids"]) for text in texts])
        return encode(texts, **options)

    monkeypatch.setattr(one.encoder, "encode", recorded)
    (found,) = speed.measure([one], 20)
    assert seen == [[20], [20, 20, 20]] * 2
    assert found.milliseconds > 0
    assert found.tokens_per_second > 0
