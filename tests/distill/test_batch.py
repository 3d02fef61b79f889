"""Packed documents have the losses and gradients of the single documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minilm_kernels.distill import DistillConfig
from minilm_kernels.distill.batch import Batch, LossWeights, prefix_lengths
from minilm_kernels.distill.models import LayerModel, position_range
from minilm_kernels.distill.packing import PADDING, Packer, Samples
from minilm_kernels.distill.step import make_batch
from minilm_kernels.distill.tokenization import DocumentTokenizer
from minilm_kernels.losses import MiniLMv2Loss

from .tiny import ARCHITECTURES, make_model, make_texts, make_tokenizer

SEQ_LEN = 32
CPU = torch.device("cpu")
TOKENIZER = DocumentTokenizer(make_tokenizer())


def pack(texts: list[str], packing: bool = True) -> Samples:
    packer = Packer(TOKENIZER, SEQ_LEN, packing)
    for text in texts:
        packer.add(TOKENIZER(text))
    packer.flush()
    return packer.samples


def documents(samples: Samples) -> list[np.ndarray]:
    """The tokens of every piece of a document, with special tokens."""
    found = []
    for ids, positions in zip(*samples, strict=True):
        valid = positions != PADDING
        found += np.split(ids[valid], np.flatnonzero(positions[valid] == 0)[1:])
    return found


def sides(architecture: str) -> tuple[LayerModel, LayerModel]:
    teacher, student = (make_model(architecture, seed).double().eval() for seed in (0, 1))
    return LayerModel(teacher.requires_grad_(False), -1, None, "teacher"), LayerModel(student, -1, None, "student")


def loss_of(batch: Batch, models: tuple[LayerModel, LayerModel], reduction: str) -> torch.Tensor:
    loss = MiniLMv2Loss(12, reduction=reduction)
    with torch.no_grad():
        teacher = models[0].project(batch)
    return loss(teacher, models[1].project(batch), **batch.loss_arguments())


def alone(model: Any, document: np.ndarray, mask: str, prefix: int) -> Any:
    """Q, K and V of a single document, without padding and with an explicit mask."""
    order = torch.arange(len(document))
    visible = torch.ones(len(document), len(document), dtype=torch.bool)
    if mask != "bidirectional":
        visible = (order[:, None] >= order[None, :]) | (order[None, :] < (prefix if mask == "prefix" else 0))
    inputs: dict[str, Any] = {"input_ids": torch.tensor(document, dtype=torch.long)[None]}
    if mask != "bidirectional":
        inputs["attention_mask"] = torch.where(visible, 0.0, -1e4).double()[None, None]
    return model.extractor(**inputs)


@pytest.mark.parametrize("mask", ["bidirectional", "causal", "prefix"])
@pytest.mark.parametrize("layout", ["padded", "masked", "row"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packed_losses_are_those_of_the_documents_alone(architecture: str, layout: str, mask: str) -> None:
    packing = layout != "padded"
    if (architecture, layout) == ("mpnet", "row"):
        return  # has no packed attention
    samples = pack(make_texts(9, seed=3, longest=20), packing)
    assert (samples.positions == PADDING).any()
    if packing:
        assert ((samples.positions == 0).sum(1) > 1).any()
    models = sides(architecture)
    prefixes = prefix_lengths(samples, 0.2, 0.8, (0,)) if mask == "prefix" else None
    batch = Batch(samples, CPU, packed=packing, causal=mask == "causal", prefixes=prefixes)
    if layout == "row":
        masked, models = models, sides(architecture)
        for side in models:
            side.use_packed_attention()
            side.model.eval()
    found = loss_of(batch, models, "sequence")
    found.backward()
    name, weight = next((n, p) for n, p in models[1].model.named_parameters() if "word_embeddings" in n)
    gradient, weight.grad = weight.grad, None

    loss, total = MiniLMv2Loss(12), torch.zeros((), dtype=torch.float64)
    pieces = documents(samples)
    for number, piece in enumerate(pieces):
        prefix = 0 if prefixes is None else int(prefixes[number])
        teacher, student = (alone(side, piece, mask, prefix) for side in (masked if layout == "row" else models))
        prefix_lens = None if prefixes is None else torch.tensor([prefix])
        total = total + loss(teacher, student, causal=mask == "causal", prefix_lens=prefix_lens) / len(pieces)
    if layout == "row":
        weight = masked[1].model.get_parameter(name)
    total.backward()
    assert found.item() == pytest.approx(total.item(), rel=1e-9)
    assert found.item() > 1e-3
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_a_token_of_another_document_changes_nothing() -> None:
    samples = pack(make_texts(6, seed=3, longest=12))
    side = sides("bert")[0]
    before = side.extractor(**Batch(samples, CPU, packed=True).model_inputs(0, additive=False)).query[0]
    second = int(np.flatnonzero(samples.positions[0] == 0)[1])
    samples.ids[0, second:] = 7
    after = side.extractor(**Batch(samples, CPU, packed=True).model_inputs(0, additive=False)).query[0]
    assert torch.equal(before[:second], after[:second])
    assert not torch.equal(before[second:], after[second:])


def test_a_row_has_all_documents_first_and_always_the_same_shapes() -> None:
    """Padding makes documents that are no longer than the others, so that positions and kernels have room for them."""
    shapes = set()
    for seed, longest in ((3, 20), (4, 20), (5, 25), (6, 2)):
        samples = pack(make_texts(60, seed=seed, longest=longest))
        samples = samples.part(slice(0, 4))
        valid = samples.positions != PADDING
        batch = Batch(samples, CPU, packed=True)
        inputs = batch.row_inputs(7, 28)
        tokens, borders = int(valid.sum()), inputs["cu_seq_lens_q"]
        ids, positions = inputs["input_ids"][0], inputs["position_ids"][0] - 7
        assert ids[:tokens].tolist() == samples.ids[valid].tolist()
        assert positions[:tokens].tolist() == samples.positions[valid].tolist()
        lengths = borders.diff()
        assert borders.dtype == torch.int32
        assert (int(borders[0]), int(borders[-1]), int(lengths.min())) == (0, 4 * SEQ_LEN, 0)
        pieces = documents(samples)
        assert lengths[: len(pieces)].tolist() == [len(piece) for piece in pieces]
        assert lengths.max() == max(map(len, pieces))
        assert torch.equal(positions, torch.cat([torch.arange(n) for n in lengths.tolist()]))
        shapes.add((ids.shape, borders.shape, inputs["max_length_q"]))
        with pytest.raises(ValueError, match=r"max_seqlen=2: a document of the batch has"):
            batch.row_inputs(0, 2)
    assert shapes == {((4 * SEQ_LEN,), (17,), 28), ((4 * SEQ_LEN,), (65,), 28)}  # 2 words: 4 tokens a document


@pytest.mark.parametrize("reduction", ["sequence", "token", "sum"])
@pytest.mark.parametrize("packing", [True, False])
def test_weighted_parts_sum_to_the_whole(reduction: str, packing: bool) -> None:
    samples = pack(make_texts(12, seed=5, longest=25), packing)
    models = sides("bert")
    whole = loss_of(Batch(samples, CPU, packed=packing), models, reduction).item()
    total, parts = LossWeights.of(samples), 0.0
    for part in (slice(0, 1), slice(1, 4), slice(4, len(samples.ids))):
        value = loss_of(Batch(samples.part(part), CPU, packed=packing), models, reduction).item()
        parts += value * LossWeights.of(samples.part(part)).weight(reduction, total)
    assert parts == pytest.approx(whole, rel=1e-12)


def test_counts_and_prefixes() -> None:
    positions = np.array([[0, 1, 2, 0, 1, PADDING], [0, 0, 1, 2, 3, 4]], np.int32)
    samples = Samples(np.zeros_like(positions), positions)
    assert LossWeights.of(samples) == LossWeights(documents=4, tokens=11)
    assert prefix_lengths(samples, 1.0, 1.0, (0,)).tolist() == [3, 2, 1, 5]
    assert prefix_lengths(samples, 0.0, 0.0, (0,)).tolist() == [0, 0, 0, 0]
    wide = Samples(np.zeros((500, 101)), np.tile(np.arange(101), (500, 1)))
    drawn = prefix_lengths(wide, 0.25, 0.75, (1, 2))
    assert np.array_equal(drawn, prefix_lengths(wide, 0.25, 0.75, (1, 2)))
    assert not np.array_equal(drawn, prefix_lengths(wide, 0.25, 0.75, (1, 3)))
    assert 25 <= drawn.min() < 27
    assert 74 < drawn.max() <= 76


@pytest.mark.parametrize("packing", [True, False])
def test_parts_have_the_prefixes_of_the_whole(packing: bool, settings: Callable[..., DistillConfig]) -> None:
    config = settings(mask="prefix", packing=packing)
    samples = pack(make_texts(40), packing)

    def prefixes(part: slice) -> list[int]:
        found = make_batch(config, "prefix", samples, CPU, (0,), part).prefixes
        assert found is not None
        return found.tolist()

    parts = [prefixes(slice(start, start + 3)) for start in range(0, len(samples.ids), 3)]
    assert [prefix for part in parts for prefix in part] == prefixes(slice(0, len(samples.ids)))
    assert parts[0] != parts[1]


def test_positions_of_every_architecture() -> None:
    expected = {"bert": (0, 40), "distilbert": (0, 40), "roberta": (2, 38), "mpnet": (2, 38)}
    assert {name: position_range(make_model(name)) for name in ARCHITECTURES} == expected


def test_rows_of_one_document_are_trimmed() -> None:
    samples = pack(["w0 w1 w2", "w0 w1 w2 w3 w4"], packing=False)
    assert Batch(samples, CPU, packed=False).ids.shape == (2, 7)
    assert Batch(samples, CPU, packed=True).ids.shape == (2, SEQ_LEN)
