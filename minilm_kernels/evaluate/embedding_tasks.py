"""Tests of frozen sentence features: a linear probe, similarity of sentence pairs, and retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim, semantic_search
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .score import Score, bootstrapped

_FOLDS = 5


def linear_probe(encoder: SentenceTransformer, texts: Sequence[str], labels: Sequence[str | int]) -> Score:
    """Accuracy of a logistic regression on frozen features, in five-fold cross-validation.

    Args:
        texts: (texts,).
        labels: the class of each text; every class needs at least five texts.

    Raises:
        ValueError: fewer than two classes, or a class with fewer texts than folds.
    """
    names, counts = numpy.unique(numpy.asarray(labels, dtype=str), return_counts=True)
    if len(names) < 2 or counts.min() < _FOLDS:
        raise ValueError(
            f"expected two or more classes of {_FOLDS} or more texts, got "
            + ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True))
        )
    features = encoder.encode(list(texts), show_progress_bar=False)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    predicted = cross_val_predict(classifier, features, labels, cv=folds)
    return bootstrapped(numpy.mean, predicted == numpy.asarray(labels))


def pair_similarity(
    encoder: SentenceTransformer, first: Sequence[str], second: Sequence[str], similarity: Sequence[float]
) -> Score:
    """Spearman correlation between cosine similarity and the given similarity.

    Args:
        first, second: the sentences of each pair.
        similarity: one number per pair.
    """
    texts = sorted({*first, *second})
    place = {text: number for number, text in enumerate(texts)}
    features = encoder.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    chosen = [features[[place[text] for text in side]] for side in (first, second)]
    cosine = pairwise_cos_sim(*chosen).cpu().numpy()
    return bootstrapped(lambda x, y: spearmanr(x, y).statistic, cosine, numpy.asarray(similarity, dtype=float))


def retrieval_accuracy(encoder: SentenceTransformer, queries: Sequence[str], answers: Sequence[str]) -> Score:
    """Share of queries whose most similar answer, among all answers, is their own.

    Args:
        queries: (queries,).
        answers: the answer of each query. Equal answers count as the same.
    """
    corpus = sorted(set(answers))
    found = semantic_search(
        encoder.encode(list(queries), convert_to_tensor=True, show_progress_bar=False),
        encoder.encode(corpus, convert_to_tensor=True, show_progress_bar=False),
        top_k=1,
    )
    right = [corpus[hits[0]["corpus_id"]] == answer for hits, answer in zip(found, answers, strict=True)]
    return bootstrapped(numpy.mean, right)
