"""Names of the layers and of the query, key and value projections in models, and the division of fused projections."""

import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilm_kernels._full_attention import check_full_attention, nearest_config
from minilm_kernels._wrappers import is_pretrained_model

# The projections in an attention module, and the order of the output if one module projects all three ("" for three).
_PROJECTIONS: list[tuple[tuple[str, ...], str]] = [
    (("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "latent"),
    (("q_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "latent"),
    (("query", "key", "value"), ""),
    *((tuple(name.format(x) for x in ("query", "key", "value")), "") for name in ("{}_proj", "projection_{}")),
    *(
        (tuple(name.format(x) for x in "qkv"), "")
        for name in ("{}_proj", "{}_lin", "linear_{}", "project_{}", "to_{}", "W{}", "{}")
    ),
    *(((name,), "blocks") for name in ("Wqkv", "qkv", "qkv_proj", "c_attn")),
    *(((name,), "heads") for name in ("query_key_value", "in_proj")),
]
# Model types with another order under the same name.
_ORDERS = {"codegen": "codegen", "gpt_bigcode": "heads"}
# Modules with these names that project all three belong to an attention module with a further parameter.
_REQUIRED = {"in_proj": "q_bias"}  # elsewhere in_proj is the input of a convolution or a state-space model

_SEQUENCE_FIRST = {"fsmt"}  # model types with layers of (S, B, hidden)

ORDERS = ("blocks", "heads", "codegen")
_CROSS = re.compile("cross|(enc|encoder)_?(dec|attn)", re.IGNORECASE)
_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")  # names that compiled and checkpointed modules add
# Arguments, attributes and submodules of attentions that add a term of the relative position to the scores.
_POSITION_TERMS = re.compile(
    "(rel|relative)_(pos|att)|position_bias|pos_bias|alibi|pos_att_type|distance_embedding|emb_rel"
)
# Sources of forwards that scale the queries before they call the attention function.
_SCALED = re.compile(
    r"(query\w*|q_pass|q_proj\(.*\)) \*=? self\.(scal|mla_scale|attention_head_size)|self\.scaling \* query"
)
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Stack:
    """The layers of a base model and the modules in them that project queries, keys and values.

    Attributes:
        root: the base model.
        templates: names of the query, key and value modules in `root`, with `{i}` for the index of the layer; one name
            if one module projects all three.
        order: the order of a fused projection's output, "" for three modules, "latent" for multi-head latent attention.
    """

    root: nn.Module
    templates: tuple[str, ...]
    order: str

    @property
    def layers(self) -> str:
        """The name of the list of layers, such as "encoder.layer"."""
        return self.templates[0].partition(".{i}.")[0]

    @property
    def attention(self) -> str:
        """The name of the attention module, with `{i}` for the index of the layer."""
        return self.templates[0].rpartition(".")[0]

    @property
    def groups(self) -> int:
        """The number of modules in the list of layers."""
        return len(submodule(self.root, self.layers)._modules)

    @property
    def count(self) -> int:
        """The number of layers. ALBERT's groups of layers run several times."""
        config = nearest_config(self.root, self.layers)
        return config.num_hidden_layers if hasattr(config, "num_hidden_groups") else self.groups

    def resolve(self, layer: int) -> int:
        """The number of a layer from 1, which has full attention."""
        layer = resolve_layer(layer, self.count)
        model_type = getattr(nearest_config(self.root, self.layers), "model_type", None)
        if model_type in _SEQUENCE_FIRST:
            raise ValueError(f"model: the layers of model type {model_type!r} have (S, B, hidden), not (B, S, hidden)")
        check_full_attention(self.root, [self.at(self.templates[-1], i + 1) for i in range(self.count)], layer)
        return layer

    def group(self, layer: int) -> int:
        """The index of a layer in the list of layers."""
        return int((layer - 1) / (self.count / self.groups))

    def at(self, template: str, layer: int) -> str:
        return template.replace("{i}", str(self.group(layer)))

    def paths(self, layer: int) -> list[str]:
        """The projections of a layer, as paths in the base model."""
        return [self.at(template, layer) for template in self.templates]

    def calls(self, template: str, layer: int) -> tuple[int, int]:
        """The index of a layer's call among those of a module in one forward, and the number of layers that call it."""
        modules = [_at_path(self.root, self.at(template, i + 1)) for i in range(self.count)]
        module = modules[layer - 1]
        return sum(other is module for other in modules[: layer - 1]), sum(other is module for other in modules)

    def division(self, layer: int) -> "Division":
        """The rule by which the outputs of a layer's projections become query, key and value."""
        path = self.at(self.attention, layer)
        attention, config = submodule(self.root, path), nearest_config(self.root, path)
        sizes: tuple[int, ...] = ()
        if self.order == "latent":
            sizes = tuple(_setting(attention, config, (f"{name}_head_dim",)) for name in ("qk_nope", "qk_rope", "v"))
        elif self.order:
            sizes = _heads(attention, config)
        else:
            sizes = _gated_sizes(attention, config)
        biases = [f"{x}_bias" for x in "qkv"] if len(self.templates) == 1 else []
        return Division(self.order, path, sizes, tuple(name if hasattr(attention, name) else None for name in biases))

    def quantity(self, layer: int, rotary: str) -> str:
        """The name of what is computed: see `QKVExtractor.quantity`."""
        attention = submodule(self.root, self.at(self.attention, layer))
        if rotary == "before":
            return "content" if _position_terms(attention) else "projection"
        forward = source(type(attention).forward)
        children = attention._modules.items()
        names = " ".join(name for name, child in children if not isinstance(child, nn.Identity | types.NoneType))
        found = {
            "normed": re.search(r"\b(q|k|qk|query|key)_?(layer_?)?norm", names),
            "scaled": _SCALED.search(forward),
            "rotated": _rotates(attention, forward),
            "value-normed": re.search(r"\b(v|value)_norm", names),
            "value-scaled": getattr(attention, "v_scale", 1.0) != 1.0,
        }
        return ", ".join(name for name, is_so in found.items() if is_so) or "projection"

    def check_operands(self, layer: int) -> None:
        """Checks that the operands of a layer's attention can be recorded, and that nothing is added to their scores.

        Raises:
            ValueError: they cannot. The message lists the layers that can.
        """
        reasons = [self.operands_reason(i + 1) for i in range(self.count)]
        if reason := reasons[layer - 1]:
            legal = ", ".join(str(i + 1) for i, other in enumerate(reasons) if not other)
            raise ValueError(f'rotary="after": {reason}; use rotary="before"; layers with "after": {legal or "none"}')

    def operands_reason(self, layer: int) -> str | None:
        """The reason why the operands of a layer's attention cannot be recorded; None if they can."""
        path = self.at(self.attention, layer)
        module = _at_path(self.root, path)
        if module is None:
            return f"layer {layer} has no self-attention"
        name = f"{path} ({type(module).__name__})"
        if not hasattr(module, "config") or defined_beside(module, "ALL_ATTENTION_FUNCTIONS") is None:
            return f"{name} does not use transformers' attention interface"
        if re.search(r"_attn_implementation (not )?in ", source(type(module).forward)):
            return f"{name} computes something else if its attention function has another name"
        if _position_terms(module):
            return f"{name} adds a term of the relative position to the products of queries and keys"
        return None


@dataclass(frozen=True)
class Division:
    """Divides the outputs of a layer's projections into query, key and value.

    Attributes:
        order: see `Stack`.
        attention: the attention module, as a path in the base model.
        sizes: numbers of heads of queries and keys, or widths of heads, as the order needs them.
        biases: names of parameters of the attention module that are added to query, key and value.
    """

    order: str
    attention: str
    sizes: tuple[int, ...]
    biases: tuple[str | None, ...]

    def __call__(self, root: nn.Module, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Query, key and value, each (..., heads x head width).

        Args:
            root: the base model, or a copy of the part of it that has run.
        """
        parts = _DIVISIONS[self.order](*outputs, *self.sizes)
        if any(self.biases):
            attention = root.get_submodule(self.attention)
            parts = [
                x if name is None else x + getattr(attention, name) for x, name in zip(parts, self.biases, strict=True)
            ]
        return list(parts)


def _three(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int = 0, width: int = 0
) -> Sequence[torch.Tensor]:
    """Three outputs. Each head of the query may be [query | gate]."""
    if heads and query.shape[-1] == 2 * heads * width:
        query = query.unflatten(-1, (heads, 2, width)).select(-2, 0).flatten(-2)
    return query, key, value


def _blocks(x: torch.Tensor, heads: int, key_heads: int) -> Sequence[torch.Tensor]:
    """[query | key | value], each over all heads."""
    width = x.shape[-1] // (heads + 2 * key_heads)
    return x.split([heads * width, key_heads * width, key_heads * width], dim=-1)


def _by_key_head(x: torch.Tensor, heads: int, key_heads: int) -> Sequence[torch.Tensor]:
    """The queries of each key head, its key and its value."""
    group = heads // key_heads
    parts = x.unflatten(-1, (key_heads, group + 2, -1)).split([group, 1, 1], dim=-2)
    return [part.flatten(-3) for part in parts]


def _codegen(x: torch.Tensor, heads: int, key_heads: int) -> Sequence[torch.Tensor]:
    """Four groups of [query | value | key]."""
    query, value, key = x.unflatten(-1, (4, 3, -1)).unbind(-2)
    return query.flatten(-2), key.flatten(-2), value.flatten(-2)


def _latent(
    query: torch.Tensor, shared: torch.Tensor, each: torch.Tensor, plain: int, rotated: int, width: int
) -> Sequence[torch.Tensor]:
    """Multi-head latent attention.

    The last projection gives each head [key without position | value]. The rest of the key, which will be rotated, is
    common to all heads and at the end of the projection to the latent.
    """
    keys, value = each.reshape(*query.shape[:-1], -1, plain + width).split([plain, width], dim=-1)
    common = shared[..., -rotated:].unsqueeze(-2).expand(*keys.shape[:-1], rotated)
    return query, torch.cat([keys, common], -1).flatten(-2), value.flatten(-2)


_DIVISIONS: dict[str, Callable[..., Sequence[torch.Tensor]]] = {
    "": _three,
    "blocks": _blocks,
    "heads": _by_key_head,
    "codegen": _codegen,
    "latent": _latent,
}


def _gated_sizes(attention: Any, config: Any) -> tuple[int, ...]:
    """The number and width of heads, by which a query with a gate is recognized."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(attention, "head_dim", None)
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else ()


def _heads(attention: nn.Module, config: Any) -> tuple[int, int]:
    """The numbers of heads of queries and of keys."""
    heads = _setting(attention, config, _HEADS)
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return heads, 1
    return heads, _setting(attention, config, _KEY_HEADS, heads)


def _setting(attention: nn.Module, config: Any, names: Sequence[str], default: int | None = None) -> int:
    for owner in (attention, config):
        for name in names:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    if default is None:
        raise ValueError(
            f"projections: neither {type(attention).__name__} nor a config has {names[0]}, which the division of a "
            "fused projection needs"
        )
    return default


def _rotates(attention: Any, forward: str) -> bool:
    """True if the forward of an attention module rotates the queries and keys of a layer with full attention."""
    conditions = (cond(attention) for pattern, cond in _ROTATIONS.items() if re.search(pattern, forward))
    return re.search("rotary|rope(?!_head)", forward) is not None and all(conditions)


# Conditions in the source of a forward, and when layers with full attention meet them.
_ROTATIONS: dict[str, Callable[[Any], bool]] = {
    r"if self\.use_rope": lambda attention: attention.use_rope,
    r"if self\.position_embedding_type": lambda attention: attention.position_embedding_type == "rotary",
    r"if position_embeddings is not None": lambda a: getattr(a.config, "position_embedding_type", "rope") == "rope",
    r"if self\.(sliding_window is not None|is_local_attention)": lambda a: getattr(a, "force_rope", False),
    r"if self\.sliding_window is None or": lambda attention: attention.sliding_window is None,
}


def _position_terms(attention: nn.Module) -> bool:
    """True if the attention adds a term of the relative position to the products of queries and keys."""
    config = getattr(attention, "config", None)
    if getattr(attention, "relative_attention", None) is False or getattr(config, "alibi", None) is False:
        return False
    own = {**vars(attention), **attention._modules, **attention._parameters}
    names = [name for name, value in own.items() if value is not None and value is not False and value != []]
    names += inspect.signature(type(attention).forward).parameters
    return any(_POSITION_TERMS.search(name) for name in names)


def find_stack(model: nn.Module, projections: Sequence[str] | Mapping[str, str] | None = None) -> Stack:
    """The layers of an unwrapped model.

    Args:
        projections: the names of the projections, as in `QKVExtractor`.

    Raises:
        ValueError: the names are wrong, or there are none and the architecture is unknown or has several stacks.
    """
    root = base_model(model)
    if isinstance(projections, Mapping):
        return Stack(root, *_validated_fused(model, root, projections))
    if projections is not None and not isinstance(projections, str):
        names = tuple(_validated(model, root, projections))
        last = tuple(name.rpartition(".")[2] for name in names)
        return Stack(root, names, next((order for known, order in _PROJECTIONS if known == last), ""))
    model_type = getattr(getattr(root, "config", None), "model_type", None)
    stacks = find_stacks(root)
    found = stacks
    if projections is not None:
        part = f"{_below_base(model, root, projections)}."
        found = [stack for stack in stacks if f"{stack.layers}.".startswith(part)]
    if len(found) == 1:
        return found[0]
    if stacks:
        raise ValueError(
            f"model: {type(model).__name__} has {'several' if found else 'other'} stacks of layers. Choose one by its "
            "name, or by the names of its projections: "
            + " or ".join(f"projections={stack.layers!r} ({stack.templates[0]})" for stack in found or stacks)
        )
    linear = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    candidates = dict.fromkeys(re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in linear)
    raise ValueError(
        f"model: {type(model).__name__} (model type {model_type!r}) has no projections with usual names (query, "
        "q_proj, Wqkv, ...). Give the names of the three modules, such as "
        'projections=["layers.{i}.attention.to_q", "layers.{i}.attention.to_k", "layers.{i}.attention.to_v"], '
        "where {i} stands for the layer's index, or the one of a fused projection and the order of its output, such as "
        'projections={"layers.{i}.attention.to_qkv": "blocks"}. Its linear modules: ' + ", ".join(candidates)
    )


def base_model(model: Any) -> Any:
    """The base model of a model with a task head; other models are returned unchanged."""
    if not is_pretrained_model(model):
        return model
    base = model.base_model  # in some models, the encoder, which takes other inputs
    names = model.main_input_name
    needed = {names} if isinstance(names, str) else set(names)
    return base if needed.issubset(inspect.signature(type(base).forward).parameters) else model


def find_stacks(root: nn.Module) -> list[Stack]:
    """Every list of layers with self-attention whose projections have usual names."""
    found = []
    for path, module in root.named_modules():
        path = _WRAPPERS.sub("", path)
        children = {name for name, child in module._modules.items() if child is not None}
        names, order = next((entry for entry in _PROJECTIONS if children.issuperset(entry[0])), ((), ""))
        needed = _REQUIRED.get(names[0]) if names else None
        if (
            names
            and re.search(r"\.\d+(\.|$)", path)
            and not _CROSS.search(path)
            and (not needed or hasattr(module, needed))
        ):
            config = nearest_config(root, path)
            found.append((path, names, _ORDERS.get(getattr(config, "model_type", ""), order) if order else order))
    # The index is usually the first number in a path; a model with stages, each a list of layers, has it last.
    first, last = (
        {
            tuple(re.sub(pattern, r"\1.{i}.\2", f"{path}.{name}", count=1) for name in names): order
            for path, names, order in found
        }
        for pattern in (r"^(\D+?)\.\d+\.(.+)$", r"^(.+)\.\d+\.(\D+)$")
    )
    fewer = first if len(first) <= len(last) else last
    return [Stack(root, templates, order) for templates, order in fewer.items()]


def resolve_layer(layer: int, count: int) -> int:
    """Converts a layer number, counted from 1 or from the last layer (negative), to a number counted from 1."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer: expected an int, got {layer!r}")
    if layer == 0 or abs(layer) > count:
        raise ValueError(f"layer={layer}: expected 1 to {count}, or -{count} to -1 counted from the last layer")
    return layer if layer > 0 else count + 1 + layer


def layer_path(model: nn.Module, projections: Sequence[str] | Mapping[str, str] | None = None) -> str:
    """The name of the list of layers in the base model, such as "encoder.layer"."""
    return find_stack(model, projections).layers


def merge_heads(*operands: torch.Tensor) -> list[torch.Tensor]:
    """The operands of an attention function, (B, heads, S, head width), as (B, S, hidden)."""
    return [x.transpose(1, 2).flatten(2) for x in operands]


def defined_beside(module: nn.Module, name: str) -> Any:
    """A global of the file that defines the class of a module, or one of its base classes."""
    files = [vars(sys.modules[cls.__module__]) for cls in type(module).__mro__ if cls.__module__ in sys.modules]
    return next((names[name] for names in files if name in names), None)


def source(function: Any) -> str:
    """The source of a function, or "" if it was defined without a file."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _below_base(model: nn.Module, root: nn.Module, name: str) -> str:
    """A module's name without the prefix of the base model and without wrappers of submodules."""
    if root is not model:
        name = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    return _WRAPPERS.sub("", name)


def _validated(model: nn.Module, root: nn.Module, projections: Sequence[str]) -> list[str]:
    """The names of the three projections in the base model."""
    if len(projections) != 3:
        raise ValueError(
            f"projections: expected the names of query, key and value, or {{name: order}}, got {projections!r}"
        )
    projections = [_below_base(model, root, name) for name in projections]
    lists = {name.partition(".{i}.")[0] for name in projections}
    if any(name.count(".{i}.") != 1 for name in projections) or len(lists) != 1:
        raise ValueError(
            "projections: expected three names of the form <list of layers>.{i}.<module>, over one list of layers, got "
            f"{list(projections)}"
        )
    if len(set(projections)) == 1:
        raise ValueError(
            f"projections: {projections[0]} is given three times; give a fused projection and the order of its output, "
            f'such as {{"{projections[0]}": "blocks"}}'
        )
    if not all(name.isdecimal() for name in submodule(root, lists.pop())._modules):
        raise ValueError(f"projections: {projections[0].partition('.{i}.')[0]} is not a list of layers")
    return list(projections)


def _validated_fused(model: nn.Module, root: nn.Module, projections: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The name of the fused projection in the base model, and the order of its output."""
    names, orders = list(projections), list(projections.values())
    if len(names) != 1 or orders[0] not in ORDERS:
        raise ValueError(
            "projections: expected one name and the order of its output, one of "
            f"{', '.join(map(repr, ORDERS))}, got {dict(projections)}"
        )
    name = _below_base(model, root, names[0])
    if name.count(".{i}.") != 1:
        raise ValueError(f"projections: expected a name of the form <list of layers>.{{i}}.<module>, got {name!r}")
    path = name.partition(".{i}.")[0]
    if not all(index.isdecimal() for index in submodule(root, path)._modules):
        raise ValueError(f"projections: {path} is not a list of layers")
    return (name,), orders[0]


def _at_path(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, or an error that names the model."""
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"projections: {type(root).__name__} has no module {path} ({error})") from None
