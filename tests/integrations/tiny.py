"""Tiny models with their heads, and tokenized text, for the tests of the trainers; nothing comes from a hub."""

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from minilm_kernels import MiniLMv2Loss, record_qkv
from tests.distill.tiny import SIZES, make_texts, make_tokenizer

HEADS = {
    "none": AutoModel,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}
# Without dropout, so that a batch and its micro-batches have the same gradient. Every layer has full attention.
FAMILIES = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "modernbert": {"global_attn_every_n_layers": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
DECODERS = ("gpt2", "qwen3")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
RELATION_HEADS = 4


def make(family: str = "bert", head: str = "none", layers: int = 2, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model, the same in every call. Its weights are so large that attention is far from uniform."""
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model(family, **(SIZES | sizes | SPECIAL | FAMILIES[family] | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HEADS[head].from_config(config)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    module.weight.mul_(5)
    return model.eval()


def make_dataset(count: int, seed: int = 0, longest: int = 20) -> Dataset:
    """Rows of different lengths: text, input_ids and attention_mask, without padding."""
    texts = make_texts(count, seed, longest)
    return Dataset.from_dict({"text": texts, **make_tokenizer()(texts, return_token_type_ids=False)})


@torch.no_grad()
def eval_kl(student: nn.Module, teacher: nn.Module, dataset: Dataset) -> float:
    """The relation KL of the last layers, the mean over all rows of a data set, computed in one batch."""
    batch = make_tokenizer().pad(dataset.select_columns(["input_ids", "attention_mask"])[:], return_tensors="pt")
    found = []
    for model in (teacher, student):
        training = model.training
        with record_qkv(model.eval()) as recorder:
            model(**batch)
            found.append(recorder.pop()[-1])
        model.train(training)
    causal = student.config.model_type in DECODERS
    return MiniLMv2Loss(RELATION_HEADS)(*found, batch["attention_mask"], causal=causal).item()
