"""The queries, keys and values of one Transformer layer, computed without the rest of the model.

`QKVExtractor` runs a *view* of the model: a copy of the containers from the base model down to the chosen layer's
attention, sharing every other module and every parameter with the model. In the view, a probe stands in the place of
each projection; the first one reached raises a private exception with its input, and the extractor applies the three
projections to it. The model itself gets no hook and no new attribute, and a call keeps no state.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from minilm_kernels.losses import QKV

__all__ = ["QKV", "QKVExtractor", "layer_path", "resolve_layer"]

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

# What tokenizers and collators put into a batch for others. Dropped where the base model does not take it.
_FOR_OTHERS = {"labels", "next_sentence_label", "start_positions", "end_positions", "num_items_in_batch"}
_FOR_OTHERS |= {"token_type_ids", "special_tokens_mask", "offset_mapping", "length"}

_CAPTURE = "minilm_kernels_capture"


class _Reached(Exception):
    """Ends the model's forward; carries the projections' input, or (rotary="after") query, key and value."""


class _Probe(nn.Module):
    """Stands in a projection's place and hands its input to the extractor."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise _Reached(input)


class _Recorder(nn.Module):
    """Stands in a projection's place during the dry run: applies it, and ends the forward after the last one."""

    def __init__(self, projection: nn.Module, path: str, calls: dict, expected: int):
        super().__init__()
        self.projection, self.path, self.calls, self.expected = projection, path, calls, expected

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.projection(input)
        self.calls[self.path] = (input, output)
        if len(self.calls) == self.expected:
            raise _Reached
        return output


def _capture(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any):
    """An attention function that ends the forward with its (B, heads, S, head width) operands as (B, S, hidden)."""
    raise _Reached(*(x.transpose(1, 2).flatten(2) for x in (query, key, value)))


AttentionInterface.register(_CAPTURE, _capture)


class QKVExtractor(nn.Module):
    """The query, key and value projections of one layer: `extractor(**batch) -> QKV`.

    Works for BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, MPNet and those with BERT's modules (CamemBERT, ERNIE, ESM,
    ...) of transformers, as base models or below a task head (the head is not run), and with `projections` for any
    other model whose self-attention has three projection modules.

    Args:
        model: the model. It is left as it is: no hooks, no new attributes, nothing copied.
        layer: 1-based; negative counts from the last, so the default is the last layer.
        projections: for other models, the names of the query, key and value modules, as in `model.named_modules()`,
            with `{i}` for the layer's index in its list (0 for layer 1):

                QKVExtractor(llama, projections=[f"layers.{{i}}.self_attn.{p}_proj" for p in "qkv"])

            A base model's name in front ("model." here) may be given or left out. Modules that compute query, key and
            value in one product cannot be named.
        rotary: "before" gives the projections' output. "after", for models with rotary embeddings only, gives query
            and key as they enter the score product, that is after the model's own rotation (and its query and key
            norms, where it has them), heads side by side as the model lays them out.
        example: the batch of a dry run that finds the reached parameters, two tokens of id 0 by default. Needed for
            models that take no `input_ids`.

    Calling: keyword arguments of the base model's forward, usually `input_ids` and `attention_mask`, both (B, S).
    Entries meant for others (`labels`, `token_type_ids` where the model knows none, ...) are ignored, any other unknown
    name is a TypeError, because a misspelt `attention_mask` would go unnoticed. Returns QKV of (B, S, hidden) tensors
    in the projections' dtype; with grouped-query attention key and value are narrower: (B, S, key heads x head width).

    Only the modules before the projections are run, so only their parameters get a gradient. The extractor's
    `parameters()` are exactly these and the three projections', frozen ones included: it trains under
    DistributedDataParallel without `find_unused_parameters`, provided the loss uses all three outputs.
    `unreached_parameters()` names the others. Gradient checkpointing, autocast and `torch.compile(fullgraph=True,
    dynamic=True)` work. Calls from several threads do not disturb each other.

    Modules and parameters are shared with the model: what changes a parameter in either is seen in both, as is moving
    or casting (`to`, `half`, ...), and `extractor.to()` and `extractor.train()`/`eval()` act on the whole model.
    `model.train()` and `model.eval()` decide about dropout in the extractor too: the last call counts.
    Replacing a module does *not* reach an extractor that exists: after `resize_token_embeddings`, a change of attention
    implementation, adapters or pruning, make a new one. A deep copy or a pickle of the extractor contains its model.

    Raises:
        TypeError: `model` is no module, `layer` no integer; calls with names that the model does not take.
        ValueError: a layer that does not exist (the message names the legal ones); an unknown architecture or wrong
            names (it shows how to name them); a layer with sliding-window or other non-full attention, whose rows do
            not see what the relations are taken over; projections that do not share one input; rotary="after" without
            rotary embeddings.
        RuntimeError: the dry run failed, or a forward that passed by the projections.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        layer: int = -1,
        *,
        projections: Sequence[str] | None = None,
        rotary: Literal["before", "after"] = "before",
        example: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if rotary not in ("before", "after"):
            raise ValueError(f'rotary={rotary!r}: expected "before" or "after"')
        root = _base_model(model)
        templates = _templates(model, root, projections)
        layers = templates[0].partition(".{i}.")[0]
        self.layer = resolve_layer(layer, len(_submodule(root, layers)._modules))  # 1-based
        config = getattr(root, "config", None)
        _check_full_attention(config, self.layer)
        paths = [template.replace("{i}", str(self.layer - 1)) for template in templates]
        modules = [_submodule(root, path) for path in paths]

        names = inspect.signature(root.forward).parameters
        self._accepted = frozenset(name for name, p in names.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        takes_any = isinstance(root, PreTrainedModel) and any(p.kind is p.VAR_KEYWORD for p in names.values())
        # A cache would be filled, and recorded outputs would install hooks in the model.
        self._fixed = {
            name: False
            for name in ("use_cache", "output_attentions", "output_hidden_states")
            if name in names or takes_any
        }

        calls: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if rotary == "before":
            view = _view(root, layers, self.layer, {path: _Probe() for path in paths})
            recorders = {p: _Recorder(m, p, calls, len(set(paths))) for p, m in zip(paths, modules, strict=True)}
            trial = _view(root, layers, self.layer, recorders)
        else:
            trial = view = _view(root, layers, self.layer, _capturing_attention(root, config, paths))
        reached = self._dry_run(root, trial, calls, example)

        self.base = _register_only(view, reached)
        self.projections = nn.ModuleList(modules if rotary == "before" else [])
        self.__dict__["model"] = model  # unregistered: its other parameters are not the extractor's
        self.training = model.training

    def forward(self, **batch: Any) -> QKV:
        unknown = [name for name in batch if name not in self._accepted and name not in _FOR_OTHERS]
        if unknown:
            raise TypeError(f"batch: unknown {', '.join(unknown)}; the model takes {', '.join(sorted(self._accepted))}")
        taken = {name: value for name, value in batch.items() if name in self._accepted}
        try:
            self.base(**{**taken, **self._fixed})
        except _Reached as reached:
            found = reached.args
        else:
            raise RuntimeError(f"the model's forward ended without reaching the projections of layer {self.layer}")
        if len(found) == 3:
            return QKV(*found)
        query, key, value = self.projections
        return QKV(query(found[0]), key(found[0]), value(found[0]))

    def unreached_parameters(self) -> list[str]:
        """Names, in `model.named_parameters()`, of the parameters that query, key and value do not depend on."""
        reached = {id(p) for p in self.parameters()}
        return [name for name, p in self.model.named_parameters() if id(p) not in reached]

    def train(self, mode: bool = True) -> "QKVExtractor":
        self.model.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "QKVExtractor":
        self.model._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"layer={self.layer}"

    def _dry_run(self, root: nn.Module, trial: nn.Module, calls: dict, example: Mapping[str, Any] | None) -> set[int]:
        """The ids of the parameters that query, key and value depend on, by the autograd graph of one small batch."""
        if example is None:
            if "input_ids" not in self._accepted:
                raise ValueError(
                    f"example: {type(root).__name__} takes no input_ids, so give a small batch of what it takes: "
                    f"{', '.join(sorted(self._accepted))}"
                )
            ids = torch.zeros(1, 2, dtype=torch.long, device=next(root.parameters()).device)
            example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            example = {name: value for name, value in example.items() if name in self._accepted}
        aliases: dict[int, nn.Parameter] = {}
        with torch.inference_mode(False), torch.enable_grad():
            try:
                _private(trial, aliases)(**example, **self._fixed)
            except _Reached as reached:
                outputs = list(reached.args)
            except Exception as error:
                raise RuntimeError(
                    f"the dry run over {type(root).__name__} failed ({error}); if the batch is the reason, give a "
                    "small one that the model takes as example=..."
                ) from error
            else:
                raise RuntimeError(f"the forward of {type(root).__name__} passed by the named projections")
        if calls:
            inputs, recorded = zip(*calls.values(), strict=True)
            first = inputs[0]
            if any(x is not first and (x.shape != first.shape or not torch.equal(x, first)) for x in inputs):
                raise ValueError(f"projections: {', '.join(calls)} do not get one input: this is no self-attention")
            outputs = list(recorded)
        leaves = _leaves(outputs)
        return {original for original, alias in aliases.items() if id(alias) in leaves}


def resolve_layer(layer: int, count: int) -> int:
    """The 1-based number of a layer that is given 1-based or, negative, counted from the last."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer: expected an int, got {layer!r}")
    if layer == 0 or abs(layer) > count:
        raise ValueError(f"layer={layer}: expected 1 to {count}, or -{count} to -1 counted from the last layer")
    return layer if layer > 0 else count + 1 + layer


def layer_path(model: nn.Module, projections: Sequence[str] | None = None) -> str:
    """The name of the list of layers below the base model, as "encoder.layer"; `projections` as `QKVExtractor`'s."""
    return _templates(model, _base_model(model), projections)[0].partition(".{i}.")[0]


def _base_model(model: nn.Module) -> nn.Module:
    return model.base_model if isinstance(model, PreTrainedModel) else model


def _templates(model: nn.Module, root: nn.Module, projections: Sequence[str] | None) -> list[str]:
    """The checked templates of the three projections, relative to the base model."""
    model_type = getattr(getattr(root, "config", None), "model_type", None)
    if projections is None:
        if model_type in _PROJECTIONS:
            return list(_PROJECTIONS[model_type])
        linear = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
        candidates = dict.fromkeys(re.sub(r"\.\d+\.", ".{i}.", name, count=1) for name in linear)
        raise ValueError(
            f"model: {type(model).__name__} (model type {model_type!r}) is none of {', '.join(_PROJECTIONS)}. Name its "
            'three projection modules, as projections=["layers.{i}.self_attn.q_proj", "layers.{i}.self_attn.k_proj", '
            '"layers.{i}.self_attn.v_proj"], where {i} stands for the layer\'s index. Its linear modules: '
            + ", ".join(candidates)
        )
    if isinstance(projections, str) or len(projections) != 3:
        raise ValueError(f"projections: expected the names of query, key and value, got {projections!r}")
    if root is not model:
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        projections = [name.removeprefix(prefix) for name in projections]
    lists = {name.partition(".{i}.")[0] for name in projections}
    if any(name.count(".{i}.") != 1 for name in projections) or len(lists) != 1:
        raise ValueError(
            "projections: expected three names of the form <list of layers>.{i}.<module>, over one list of layers, got "
            f"{list(projections)}"
        )
    if len(set(projections)) == 1:
        raise ValueError(f"projections: {projections[0]} is named three times; a fused projection cannot be used")
    if not all(name.isdecimal() for name in _submodule(root, lists.pop())._modules):
        raise ValueError(f"projections: {projections[0].partition('.{i}.')[0]} is no list of layers")
    return list(projections)


def _submodule(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"projections: {type(root).__name__} has no module {path} ({error})") from None


def _check_full_attention(config: Any, layer: int) -> None:
    types = getattr(config, "layer_types", None)
    if types is not None:
        kind = types[layer - 1]
    else:
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kind = "full_attention" if window is None else "sliding_attention"
    if kind != "full_attention":
        full = [i for i, t in enumerate(types or (), 1) if t == "full_attention"]
        raise ValueError(
            f"layer={layer} has {kind}: its rows do not see what the relations are taken over; "
            f"layers with full attention: {', '.join(map(str, full)) or 'none'}"
        )


def _capturing_attention(root: nn.Module, config: Any, paths: Sequence[str]) -> dict[str, nn.Module]:
    """The attention module of the layer, with the capturing function as its attention implementation."""
    path = paths[0].rpartition(".")[0]
    attention = root.get_submodule(path)
    if getattr(config, "rope_parameters", None) is None or getattr(attention, "config", None) is None:
        raise ValueError(f'rotary="after": {type(root).__name__} has no rotary embedding that can be applied')
    capturing: Any = copy.deepcopy(attention.config)
    capturing._attn_implementation = _CAPTURE
    twin = _copy(attention)
    twin.__dict__["config"] = capturing
    return {path: twin}


def _copy(module: nn.Module) -> nn.Module:
    """A shallow copy with its own table of children; parameters and buffers stay in the tables of the original."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def _graft(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A copy in which other modules stand at the given paths; what is not on a path is shared."""
    if "" in replaced:
        return replaced[""]
    twin = _copy(module)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, new in replaced.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = new
    for name, inner in below.items():
        twin._modules[name] = _graft(module.get_submodule(name), inner)
    return twin


def _view(root: nn.Module, layers: str, layer: int, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """The grafted model without the later layers. Its last layer ends by an exception, so it is not checkpointed."""
    view = _graft(root, replaced)
    kept = view.get_submodule(layers)._modules
    for name in list(kept)[layer:]:
        del kept[name]
    last = view.get_submodule(layers).get_submodule(str(layer - 1))
    last.__dict__["gradient_checkpointing"] = False
    return view


def _register_only(module: nn.Module, reached: set[int]) -> nn.Module:
    """The module if all its parameters are reached; otherwise a copy in which the others are plain attributes.

    They stay attributes because an unreached module may be executed, as MPNet's position bias before its first layer.
    """
    if all(id(p) in reached for p in module.parameters()):
        return module
    twin = _copy(module)
    hidden = {name: p for name, p in module._parameters.items() if p is not None and id(p) not in reached}
    if hidden:
        twin.__dict__["_parameters"] = {name: p for name, p in module._parameters.items() if name not in hidden}
        twin.__dict__.update(hidden)
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _register_only(child, reached)
    return twin


def _private(module: nn.Module, aliases: dict[int, nn.Parameter]) -> nn.Module:
    """A copy for the dry run: evaluation mode, no hooks, own buffers, and trainable parameters over shared storage."""
    twin = _copy(module)
    for parameter in module._parameters.values():
        if parameter is not None and id(parameter) not in aliases:
            aliases[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.is_floating_point())
    twin.__dict__.update(
        training=False,
        _forward_hooks={},
        _forward_pre_hooks={},
        _buffers={name: None if b is None else b.clone() for name, b in module._buffers.items()},
        _parameters={name: None if p is None else aliases[id(p)] for name, p in module._parameters.items()},
    )
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = _private(child, aliases)
    return twin


def _leaves(outputs: Iterable[torch.Tensor]) -> set[int]:
    """The ids of the leaf tensors in the autograd graph of the outputs."""
    nodes = [output.grad_fn for output in outputs]
    seen, leaves = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return leaves
