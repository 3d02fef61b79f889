"""A small teacher of each family of text models, with its real layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from .tiny import SPECIAL, WORDS

_TEXT = {"vocab_size": len(SPECIAL) + len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0}
_SIZES = {**_TEXT, "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96}
_ROBERTA = {**_SIZES, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 1}
_DECODER = {**_SIZES, "bos_token_id": 2, "eos_token_id": 3}
_GROUPED = {**_DECODER, "num_key_value_heads": 2, "head_dim": 12}
_GEMMA3 = {**_GROUPED, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
_T5 = {"vocab_size": _TEXT["vocab_size"], "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 4, "num_heads": 4}
_BART = {f"{part}_{name}": x for part in ("encoder", "decoder") for name, x in (("layers", 4), ("attention_heads", 4))}
_BART |= {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "d_model": 48, "bos_token_id": 2, "eos_token_id": 3}

# Name -> (model type, settings of its config).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _SIZES),
    "camembert": ("camembert", _ROBERTA),
    "ernie": ("ernie", _SIZES),
    "rembert": ("rembert", {**_SIZES, "input_embedding_size": 24}),
    "roberta": ("roberta", _ROBERTA),
    "xlm-roberta": ("xlm-roberta", _ROBERTA),
    "distilbert": ("distilbert", {**_TEXT, "dim": 48, "n_layers": 4, "n_heads": 4, "hidden_dim": 96}),
    "electra": ("electra", {**_SIZES, "embedding_size": 24}),
    "mpnet": ("mpnet", {**_SIZES, "pad_token_id": 1}),
    "albert": ("albert", {**_SIZES, "embedding_size": 24}),
    "deberta-v2": (
        "deberta-v2",
        {**_SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0},
    ),
    "modernbert": ("modernbert", {**_SIZES, "local_attention": 8, "global_attn_every_n_layers": 3}),
    "eurobert": ("eurobert", {**_SIZES, "num_key_value_heads": 4, "head_dim": 12}),
    "gte": ("gte", _SIZES),
    "nomic": ("nomic_bert", _SIZES),
    "jina-v3": ("jina_embeddings_v3", _ROBERTA),
    "t5": ("t5", {**_T5, "pad_token_id": 0, "decoder_start_token_id": 0}),
    "bart": ("bart", {**_TEXT, **_BART, "pad_token_id": 1}),
    "gpt2": ("gpt2", {**_TEXT, "n_layer": 4, "n_embd": 48, "n_head": 4, "n_inner": 96}),
    "llama": ("llama", {**_DECODER, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma": ("gemma", _GROUPED),
    "gemma2": ("gemma2", {**_GROUPED, "sliding_window": 6}),
    "gemma3": ("gemma3_text", _GEMMA3),
    "embedding-gemma": ("gemma3_text", {**_GEMMA3, "use_bidirectional_attention": True}),
}
CAUSAL = {"gpt2", "llama", "qwen3", "gemma", "gemma2", "gemma3"}
# BART counts positions in the sample, and DeBERTa takes no mask of pairs.
NOT_PACKED = {"bart", "deberta-v2"}


def make_teacher(family: str) -> PreTrainedModel:
    """A random model. Its weights are so large that attention is far from uniform."""
    model_type, settings = FAMILIES[family]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
    return model
