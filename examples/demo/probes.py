"""Evaluates the frozen features of an encoder: topic accuracy of a ridge probe, and agreement with human similarity.

Features are the mean of `last_hidden_state` over the valid tokens. They depend on the whole model, including the part
of a distilled student's last layer that distillation does not train.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .assets import LabelledTexts, RatedDocuments

MAX_TOKENS = 128
_FOLDS = 5
_REPEATS = 5


@torch.inference_mode()
def mean_pooled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    batch_size: int = 64,
) -> torch.Tensor:
    """Mean of `last_hidden_state` over the valid tokens of each text. The mode of the model is restored.

    Args:
        max_tokens: texts are truncated to this number of tokens.
        batch_size: texts per batch; batches are sorted by length to reduce padding.

    Returns:
        (texts, hidden) float32 on the CPU.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    by_length = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    features = torch.empty(len(texts), model.config.hidden_size)
    training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(texts), batch_size), "features", leave=False, disable=None):
            chosen = by_length[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [encoded[index] for index in chosen]}, return_tensors="pt")
            batch = batch.to(model.device)
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            features[chosen] = ((hidden * mask).sum(1) / mask.sum(1)).cpu()
    finally:
        model.train(training)
    return features


def ridge_accuracy(features: torch.Tensor, labels: Sequence[str]) -> float:
    """Accuracy of a ridge classifier in repeated five-fold cross-validation.

    The random folds are fixed, and repeated five times to reduce the noise of a single split. Each fold is a
    closed-form solve with centered one-hot targets and argmax over the classes, on features standardized by the
    training texts. The ridge strength is the number of training texts; a third or three times of it changes the
    accuracy by at most one point.

    Args:
        features: (texts, hidden).
        labels: the class of each text.

    Raises:
        ValueError: not one label for each feature, or fewer than five.
    """
    if len(features) != len(labels) or len(labels) < _FOLDS:
        raise ValueError(f"labels: expected one for each of {_FOLDS} or more features, got {len(labels)}")
    classes = sorted(set(labels))
    target = torch.tensor([classes.index(label) for label in labels])
    one_hot = torch.nn.functional.one_hot(target, len(classes)).double()
    generator = torch.Generator().manual_seed(0)
    folds = [torch.randperm(len(labels), generator=generator) % _FOLDS for _ in range(_REPEATS)]
    right = 0
    for test in (fold == k for fold in folds for k in range(_FOLDS)):
        known = features[~test].double()
        scaled = (features.double() - known.mean(0)) / known.std(0).clamp_min(1e-12)
        x, offset = scaled[~test], one_hot[~test].mean(0)
        gram = x.T @ x + len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        weight = torch.linalg.solve(gram, x.T @ (one_hot[~test] - offset))
        right += int(((scaled[test] @ weight + offset).argmax(1) == target[test]).sum())
    return right / (_REPEATS * len(labels))


def similarity_correlation(features: torch.Tensor, similarity: torch.Tensor) -> float:
    """Pearson correlation between the cosine similarity of the features and the human similarity, over all i < j.

    Args:
        features: (documents, hidden).
        similarity: (documents, documents).
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    i, j = torch.triu_indices(len(unit), len(unit), offset=1)
    return torch.corrcoef(torch.stack([(unit[i] * unit[j]).sum(1), similarity[i, j].double()]))[0, 1].item()


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, news: LabelledTexts, rated: RatedDocuments
) -> dict[str, float]:
    """Evaluates a model. Returns `{"bbc_accuracy": ..., "lee_r": ...}`."""
    return {
        "bbc_accuracy": ridge_accuracy(mean_pooled(model, tokenizer, news.texts), news.labels),
        "lee_r": similarity_correlation(mean_pooled(model, tokenizer, rated.documents), rated.similarity),
    }
