"""--attention and --max-document-length in a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minilm_kernels.distill import DistillConfig, distill
from minilm_kernels.distill.models import TeacherStudent, load_models
from minilm_kernels.distill.packing import PADDING, Packer, Samples
from minilm_kernels.distill.step import loss_components, make_batch
from minilm_kernels.distill.tokenization import DocumentTokenizer
from tests.packed.test_attention import Largest

CPU = torch.device("cpu")
Settings = Callable[..., DistillConfig]


def samples_of(models: TeacherStudent, config: DistillConfig, lengths: Any) -> Samples:
    packer = Packer(DocumentTokenizer(models.tokenizer), config.max_seq_length, True, models.max_document_length)
    for length in lengths:
        packer.add(np.random.default_rng(length).integers(5, 65, length).astype(np.int32))
    packer.flush()
    return packer.samples


@pytest.mark.parametrize("attention", ["auto", "packed", "mask"])
def test_rows_may_be_longer_than_the_models_positions(attention: str, settings: Settings, capfd: Any) -> None:
    """The models have 40 positions. Longer documents are cut."""
    result = distill(settings(max_seq_length=200, max_steps=3, attention=attention, dropout=0.1))
    assert result.eval_after["eval_loss"] < result.eval_before["eval_loss"]
    chosen = "mask" if attention == "mask" else "teacher packed, student packed"
    assert f"attention: {chosen}\n" in capfd.readouterr().err


@pytest.mark.parametrize("longest", [None, 40, 17])
def test_documents_are_cut_at_their_own_length(longest: int | None, settings: Settings) -> None:
    config = settings(max_seq_length=100, max_document_length=longest)
    models = load_models(config, CPU)
    samples = samples_of(models, config, (90, 5, 300))
    assert models.max_document_length == (longest or 40)
    assert samples.positions.max() + 1 == (longest or 40)
    assert (samples.positions != PADDING).sum() > 395
    losses = []
    for attention in ("packed", "mask"):
        models = load_models(settings(max_seq_length=100, max_document_length=longest, attention=attention), CPU)
        models.student.model.eval()
        batch = make_batch(config, models.mask, samples, CPU, (0,), slice(0, 9))
        losses.append(sum(loss_components(models, batch).values()))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_the_loss_of_long_rows_needs_nothing_of_their_square(settings: Settings) -> None:
    config = settings(max_seq_length=4096, dropout=0.0)
    models = load_models(config, CPU)
    samples = samples_of(models, config, [37] * 110)
    with Largest() as seen:
        batch = make_batch(config, models.mask, samples, CPU, (0,), slice(0, 1))
        sum(loss_components(models, batch).values()).backward()
    assert 4096 * 96 <= seen.elements < 4096 * 512


def test_padding_of_documents_has_no_packed_attention(settings: Settings) -> None:
    models = load_models(settings(packing=False), CPU)
    assert not models.teacher.packed
    assert models.attention == "attention: one document a row"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "dense"}, "--attention"),
        ({"attention": "packed", "packing": False}, "--attention packed belongs to --packing"),
        ({"max_document_length": 33}, r"--max-document-length must be from 8 to --max-seq-length \(32\), got 33"),
        ({"max_document_length": 7}, "--max-document-length must be from 8"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, settings: Settings) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**options)


@pytest.mark.parametrize("options", [{"bf16": True}, {"teacher_dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_packed_attention_with_other_options(options: dict[str, Any], settings: Settings) -> None:
    result = distill(settings(attention="packed", max_steps=2, dropout=0.1, **options))
    assert np.isfinite(result.eval_after["eval_loss"])
