"""Loads the models of a comparison as sentence encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from minilm_kernels.distill.loading import load_model, load_tokenizer, resolve_source


@dataclass(frozen=True)
class Candidate:
    """A model that is evaluated.

    Attributes:
        title: its name in tables.
        source: folder or hub name of a transformers model; None for static embeddings, which have no attention.
        encoder: turns texts into features.
    """

    title: str
    source: str | None
    encoder: SentenceTransformer

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.encoder.parameters())


def load_candidate(name: str, title: str, device: torch.device, max_tokens: int) -> Candidate:
    """Loads a transformers model, a sentence-transformers model or static embeddings of model2vec.

    A transformers model without sentence-transformers' files gets mean pooling. Weights are read from safetensors
    files only, and no code of the model is executed.

    Args:
        name: folder, folder of a finished run, or hub name.
        title: its name in tables.
        max_tokens: longer texts are truncated.

    Raises:
        FileNotFoundError, ValueError: the model cannot be loaded.
    """
    source = resolve_source(name, "MODEL")
    static = _is_static(source)
    if not static:
        load_model(source, "MODEL")  # its checks have clearer errors
    options = {"device": str(device), "trust_remote_code": False}
    if not static:
        options["model_kwargs"] = {"use_safetensors": True}
    encoder = SentenceTransformer(source, **options)
    return _prepared(title, None if static else source, encoder, max_tokens)


def distilled_static(teacher: str, device: torch.device, max_tokens: int) -> Candidate:
    """Static embeddings of a teacher by model2vec: the teacher's output for each token of its vocabulary alone.

    Raises:
        FileNotFoundError, ValueError: the teacher cannot be loaded.
    """
    from model2vec.distill import distill_from_model  # type: ignore[import-not-found]

    source = resolve_source(teacher, "--teacher")
    model, _ = load_model(source, "--teacher")
    tokenizer = load_tokenizer(source, "--teacher")
    static = distill_from_model(model, tokenizer, device=str(device))
    module = StaticEmbedding(static.tokenizer, embedding_weights=static.embedding)
    encoder = SentenceTransformer(modules=[module], device=str(device))
    return _prepared("static embeddings", None, encoder, max_tokens)


def _is_static(source: str) -> bool:
    """True for a folder of model2vec, or of a sentence-transformers model of static embeddings."""
    modules = Path(source) / "modules.json"
    return modules.exists() and "StaticEmbedding" in modules.read_text(encoding="utf-8")


def _prepared(title: str, source: str | None, encoder: SentenceTransformer, max_tokens: int) -> Candidate:
    if source is not None:
        encoder.max_seq_length = min(max_tokens, encoder.max_seq_length or max_tokens)
    return Candidate(title, source, encoder.eval())
