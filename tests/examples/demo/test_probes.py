"""The probes on data with known results."""

from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from examples.demo.assets import minilm_l6
from examples.demo.probes import mean_pooled, ridge_accuracy, similarity_correlation

TEXTS = [
    "A short one.",
    "x",
    "A much longer text, with quite a few more words than any of the others has.",
    "",
    "two words",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(minilm_l6())


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config).train()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_mean_pooled_is_the_mean_over_each_text_alone(model, tokenizer, batch_size):
    features = mean_pooled(model, tokenizer, TEXTS, max_tokens=12, batch_size=batch_size)
    assert model.training
    assert not features.requires_grad
    model.eval()
    for text, feature in zip(TEXTS, features, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = torch.tensor([ids if len(ids) <= 12 else [*ids[:11], ids[-1]]])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)


def test_ridge_separates_what_is_separable_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    number = torch.arange(400) % 4
    labels = [f"class {n}" for n in number]
    centres = torch.randn(4, 16, generator=generator)
    noise = torch.randn(400, 16, generator=generator)
    scale = 10.0 ** torch.arange(-8, 8)  # removed by the standardization
    assert ridge_accuracy((centres[number] + 0.1 * noise) * scale, labels) == 1.0
    assert 0.1 < ridge_accuracy(noise, labels) < 0.4  # chance is 0.25


def test_ridge_matches_a_plain_solution():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 103)
    features = rng.normal(size=(103, 5)) + labels[:, None] * rng.normal(size=5)
    generator = torch.Generator().manual_seed(0)
    folds = [torch.randperm(103, generator=generator).numpy() % 5 for _ in range(5)]
    right = 0
    for fold, k in product(folds, range(5)):
        train, test = fold != k, fold == k
        x = (features - features[train].mean(0)) / features[train].std(0, ddof=1)
        # Ridge regression as least squares with additional rows, without a penalty on the intercept.
        rows = np.block([[x[train], np.ones((train.sum(), 1))], [np.sqrt(train.sum()) * np.eye(5), np.zeros((5, 1))]])
        targets = np.vstack([np.eye(3)[labels[train]], np.zeros((5, 3))])
        weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
        right += (np.argmax(x[test] @ weight[:5] + weight[5], 1) == labels[test]).sum()
    assert ridge_accuracy(torch.tensor(features), [str(label) for label in labels]) == right / (5 * 103)


def test_ridge_survives_a_constant_feature_and_names_bad_labels():
    features = torch.cat([torch.eye(2).repeat(20, 1), torch.ones(40, 1)], 1)
    assert ridge_accuracy(features, ["a", "b"] * 20) == 1.0
    with pytest.raises(ValueError, match="labels"):
        ridge_accuracy(features, ["a", "b"])


def test_similarity_correlation_is_numpys():
    rng = np.random.default_rng(0)
    features, human = rng.normal(size=(9, 4)), rng.random((9, 9))
    pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    cosine = [features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j]) for i, j in pairs]
    expected = np.corrcoef(cosine, [human[pair] for pair in pairs])[0, 1]
    assert similarity_correlation(torch.tensor(features), torch.tensor(human)) == pytest.approx(expected, abs=1e-12)
