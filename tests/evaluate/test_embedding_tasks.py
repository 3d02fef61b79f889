"""Tests of frozen features, with features whose scores are known."""

import numpy
import pytest
import torch
from scipy.stats import spearmanr

from minilm_kernels.evaluate.embedding_tasks import linear_probe, pair_similarity, retrieval_accuracy

from .conftest import KnownFeatures


def test_linear_probe_finds_the_classes_that_features_separate() -> None:
    texts = [f"text {k}" for k in range(40)]
    labels = ["odd" if k % 2 else "even" for k in range(40)]
    separated = KnownFeatures({text: (float(k % 2), k / 40) for k, text in enumerate(texts)})
    assert linear_probe(separated, texts, labels).value == 1.0
    constant = KnownFeatures(dict.fromkeys(texts, (0.0, 0.0)))
    assert linear_probe(constant, texts, labels).value == pytest.approx(0.5, abs=0.2)


def test_linear_probe_needs_texts_of_each_class() -> None:
    features = KnownFeatures({str(k): (float(k),) for k in range(9)})
    with pytest.raises(ValueError, match="5 or more texts, got a: 5, b: 4"):
        linear_probe(features, [str(k) for k in range(9)], list("aaaaabbbb"))


def test_pair_similarity_is_the_correlation_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(24, 6, generator=generator)
    features = KnownFeatures({str(k): vectors[k].tolist() for k in range(24)})
    first, second = [str(k) for k in range(12)], [str(k) for k in range(12, 24)]
    given = torch.rand(12, generator=generator).tolist()
    cosine = torch.cosine_similarity(vectors[:12].double(), vectors[12:].double())
    assert pair_similarity(features, first, second, given).value == pytest.approx(spearmanr(cosine, given).statistic)


def test_retrieval_counts_queries_that_find_their_own_answer() -> None:
    angles = {"q0": 0.0, "a0": 0.1, "q1": 1.0, "a1": 1.2, "q2": 0.2, "a2": 3.0}  # q2 is nearest to a0
    features = KnownFeatures({name: (numpy.cos(x), numpy.sin(x)) for name, x in angles.items()})
    assert retrieval_accuracy(features, ["q0", "q1", "q2"], ["a0", "a1", "a2"]).value == pytest.approx(2 / 3)
    assert retrieval_accuracy(features, ["q0", "q2"], ["a0", "a0"]).value == 1.0, "equal answers are different ones"
