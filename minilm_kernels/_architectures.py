"""Names of the layers and of the query, key and value projections in models of transformers, and their divisions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilm_kernels._full_attention import check_full_attention, nearest_config
from minilm_kernels._wrappers import is_pretrained_model

_BERT = tuple(f"encoder.layer.{{i}}.attention.self.{name}" for name in ("query", "key", "value"))

# Model type -> the query, key and value modules below the base model; {i} is the layer's index in its list.
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "bert-generation": _BERT,
    "camembert": _BERT,
    "data2vec-text": _BERT,
    "ernie": _BERT,
    "esm": _BERT,
    "layoutlm": _BERT,
    "markuplm": _BERT,
    "megatron-bert": _BERT,
    "rembert": _BERT,
    "roberta-prelayernorm": _BERT,
    "roc_bert": _BERT,
    "splinter": _BERT,
    "xlm-roberta-xl": _BERT,
    "xmod": _BERT,
    "distilbert": tuple(f"transformer.layer.{{i}}.attention.{name}_lin" for name in "qkv"),
    "mpnet": tuple(f"encoder.layer.{{i}}.attention.attn.{name}" for name in "qkv"),
}

# Model type -> the one module that projects all three, and the order of its output: "blocks" is [query | key | value]
# over all heads, "heads" has the three of each head side by side.
_FUSED: dict[str, tuple[str, str]] = {
    "gpt2": ("h.{i}.attn.c_attn", "blocks"),
    "gpt_neox": ("layers.{i}.attention.query_key_value", "heads"),
    "modernbert": ("layers.{i}.attn.Wqkv", "blocks"),
    "phi3": ("layers.{i}.self_attn.qkv_proj", "blocks"),
}

# Names of the three projections in an attention module of other models.
_TRIPLES = [
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    *(tuple(name.format(x) for x in "qkv") for name in ("{}_proj", "{}_lin", "linear_{}", "{}")),
]
_CROSS = re.compile("cross|(enc|encoder)_?(dec|attn)", re.IGNORECASE)
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")  # names that compiled and checkpointed modules add


@dataclass(frozen=True)
class Stack:
    """The layers of a base model and the modules in them that project queries, keys and values.

    Attributes:
        root: the base model.
        templates: names of the query, key and value modules in `root`, with `{i}` for the index of the layer; one name
            if one module projects all three.
        order: the order of a fused projection's output, "" for three modules.
    """

    root: nn.Module
    templates: tuple[str, ...]
    order: str

    @property
    def layers(self) -> str:
        """The name of the list of layers, such as "encoder.layer"."""
        return self.templates[0].partition(".{i}.")[0]

    @property
    def count(self) -> int:
        return len(submodule(self.root, self.layers)._modules)

    def resolve(self, layer: int) -> int:
        """The number of a layer from 1, which has full attention."""
        layer = resolve_layer(layer, self.count)
        check_full_attention(self.root, self.templates[0].rpartition(".")[0], layer, self.count)
        return layer

    def paths(self, layer: int) -> list[str]:
        """The projections of a layer, as paths in the base model."""
        return [template.replace("{i}", str(layer - 1)) for template in self.templates]

    def divide(self, output: torch.Tensor, layer: int) -> Sequence[torch.Tensor]:
        """Query, key and value of a fused projection's output, each (..., heads x head width)."""
        config: Any = nearest_config(self.root, self.paths(layer)[0])
        heads = config.num_attention_heads
        if self.order == "heads":
            return [x.flatten(-2) for x in output.unflatten(-1, (heads, 3, -1)).unbind(-2)]
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        width = output.shape[-1] // (heads + 2 * key_heads)
        return output.split([heads * width, key_heads * width, key_heads * width], dim=-1)


def find_stack(model: nn.Module, projections: Sequence[str] | None = None, fused: bool = False) -> Stack:
    """The layers of an unwrapped model.

    Args:
        projections: the names of the three projections, as in `QKVExtractor`.
        fused: accept models in which one module projects all three.

    Raises:
        ValueError: the names are wrong, or there are none and the architecture is unknown or has several stacks.
    """
    root: Any = model.base_model if is_pretrained_model(model) else model
    if projections is not None:
        return Stack(root, tuple(_validated(model, root, projections)), "")
    model_type = getattr(getattr(root, "config", None), "model_type", None)
    if model_type in _PROJECTIONS:
        return Stack(root, _PROJECTIONS[model_type], "")
    if model_type in _FUSED:
        if fused:
            return Stack(root, (_FUSED[model_type][0],), _FUSED[model_type][1])
        raise ValueError(
            f"model: {type(model).__name__} computes queries, keys and values in one product "
            f"({_FUSED[model_type][0]}), before which it cannot be cut. Record them with record_qkv"
        )
    found = _searched(root)
    if len(found) > 1:
        raise ValueError(
            f"model: {type(model).__name__} has several stacks of layers. Choose one by the names of its projections: "
            + " or ".join(f"projections={list(names)}" for names in found)
        )
    if found:
        return Stack(root, found[0], "")
    linear = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    candidates = dict.fromkeys(re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in linear)
    raise ValueError(
        f"model: {type(model).__name__} (model type {model_type!r}) is none of {', '.join(_PROJECTIONS)}, and its "
        "projections have other names than q_proj, query, ... Give the names of the three modules, such as "
        'projections=["layers.{i}.attention.to_q", "layers.{i}.attention.to_k", "layers.{i}.attention.to_v"], '
        "where {i} stands for the layer's index. Its linear modules: " + ", ".join(candidates)
    )


def _searched(root: nn.Module) -> list[tuple[str, ...]]:
    """The projections of every list of layers with self-attention, found by their usual names."""
    found = {}
    for path, module in root.named_modules():
        match = re.fullmatch(r"(\D+)\.\d+\.(.+)", _WRAPPERS.sub("", path))
        triple = next((names for names in _TRIPLES if module._modules.keys() >= set(names)), None)
        if match and triple and not _CROSS.search(path):
            found[tuple(f"{match[1]}.{{i}}.{match[2]}.{name}" for name in triple)] = True
    return list(found)


def resolve_layer(layer: int, count: int) -> int:
    """Converts a layer number, counted from 1 or from the last layer (negative), to a number counted from 1."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer: expected an int, got {layer!r}")
    if layer == 0 or abs(layer) > count:
        raise ValueError(f"layer={layer}: expected 1 to {count}, or -{count} to -1 counted from the last layer")
    return layer if layer > 0 else count + 1 + layer


def layer_path(model: nn.Module, projections: Sequence[str] | None = None) -> str:
    """The name of the list of layers in the base model, such as "encoder.layer"."""
    return find_stack(model, projections).layers


def merge_heads(*operands: torch.Tensor) -> list[torch.Tensor]:
    """The operands of an attention function, (B, heads, S, head width), as (B, S, hidden)."""
    return [x.transpose(1, 2).flatten(2) for x in operands]


def _validated(model: nn.Module, root: nn.Module, projections: Sequence[str]) -> list[str]:
    """The names of the three projections in the base model."""
    if isinstance(projections, str) or len(projections) != 3:
        raise ValueError(f"projections: expected the names of query, key and value, got {projections!r}")
    if root is not model:
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        projections = [name.removeprefix(prefix) for name in projections]
    projections = [_WRAPPERS.sub("", name) for name in projections]
    lists = {name.partition(".{i}.")[0] for name in projections}
    if any(name.count(".{i}.") != 1 for name in projections) or len(lists) != 1:
        raise ValueError(
            "projections: expected three names of the form <list of layers>.{i}.<module>, over one list of layers, got "
            f"{list(projections)}"
        )
    if len(set(projections)) == 1:
        raise ValueError(f"projections: {projections[0]} is given three times; a fused projection cannot be used")
    if not all(name.isdecimal() for name in submodule(root, lists.pop())._modules):
        raise ValueError(f"projections: {projections[0].partition('.{i}.')[0]} is not a list of layers")
    return list(projections)


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, or an error that names the model."""
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"projections: {type(root).__name__} has no module {path} ({error})") from None
