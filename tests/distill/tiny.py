"""Tiny models, tokenizers and text for the tests of the distillation loop; nothing comes from a hub."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(60)]
SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 40}
LAYERS = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
# The padding index of RoBERTa is 1, so its positions begin at 2.
ROBERTA = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 1}
DISTIL = {"dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**SIZES, **LAYERS)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES, **LAYERS, **ROBERTA)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES, **LAYERS)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(**SIZES, **DISTIL)),
}


def make_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model. Its weights are so large that attention is far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture]()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
    return model


def make_tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word, between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in named.items()}
    )


def make_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count)]


def save_model(folder: Path, architecture: str = "bert", seed: int = 0) -> Path:
    make_model(architecture, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
