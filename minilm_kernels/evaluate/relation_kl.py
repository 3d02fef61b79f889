"""The loss of MiniLM on text that no training has seen, with an interval over its samples."""

from __future__ import annotations

import numpy
import torch
from tqdm import tqdm

from minilm_kernels.distill.bad_documents import BadDocuments
from minilm_kernels.distill.batch import LossWeights
from minilm_kernels.distill.config import DistillConfig
from minilm_kernels.distill.eval_set import collect_eval_set
from minilm_kernels.distill.models import load_models
from minilm_kernels.distill.packing import Packer
from minilm_kernels.distill.sources import open_sources
from minilm_kernels.distill.step import loss_vector, make_batch
from minilm_kernels.distill.tokenization import DocumentTokenizer

from .score import Score, bootstrapped


def relation_kl(config: DistillConfig, device: torch.device) -> Score:
    """KL between the relations of teacher and student, as `minilm-distill` computes its evaluation loss.

    Args:
        config: names teacher and student, their layers, the loss, and the text as `eval_text`.

    Raises:
        FileNotFoundError, ValueError: a model or the text cannot be used, or the models do not fit each other.
    """
    models = load_models(config, device)
    models.student.model.eval()
    tokenizer = DocumentTokenizer(models.tokenizer)
    samples = collect_eval_set(
        open_sources(
            config.eval_text,
            text_column=config.text_column,
            by_line=config.documents == "line",
            option="--text",
        ),
        packer=Packer(tokenizer, config.max_seq_length, config.packing, models.max_document_length),
        tokenizer=tokenizer,
        max_samples=config.eval_samples,
        bad_documents=BadDocuments(config.bad_documents, lambda message: None),
    ).samples
    total = LossWeights.of(samples)
    factors = torch.tensor(list(models.loss.relations.values()), device=device)
    weights, losses = [], []
    for number in tqdm(range(len(samples.ids)), "relation KL", leave=False, disable=None):
        part = slice(number, number + 1)
        batch = make_batch(config, models.mask, samples, device, (config.seed, 2), part)
        weights.append(LossWeights.of(samples.part(part)).weight(config.reduction, total))
        losses.append(float((factors * loss_vector(config, models, batch, requires_grad=False)).sum()))
    return bootstrapped(lambda loss, weight: numpy.average(loss, weights=weight), losses, weights)
