"""The queries, keys and values of one Transformer layer, computed without the rest of the model.

`QKVExtractor` runs a *view* of the model: a copy of the containers from the base model down to the chosen layer's
attention, sharing every other module and every parameter with the model. In the view, a probe stands in the place of
each projection; the first one reached raises a private exception with its input, and the extractor applies the three
projections to it. The model itself gets no hook and no new attribute, and a call keeps no state.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from minilm_kernels._full_attention import check_full_attention, nearest_config
from minilm_kernels._module_view import (
    cut,
    follow,
    graft,
    has_own_forward,
    leaves,
    pinned,
    private,
    register_only,
    switches,
    with_attention,
)
from minilm_kernels._wrappers import unwrap
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

# Batch entries that tokenizers, collators and sentence-transformers make for others. Dropped where the base model does
# not take them.
_FOR_OTHERS = {"labels", "label", "label_ids", "next_sentence_label", "start_positions", "end_positions"}
_FOR_OTHERS |= {"num_items_in_batch", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"}
_FOR_OTHERS |= {"overflow_to_sample_mapping", "modality", "prompt_length", "task"}
# Batch entries that describe flattened batches. Most attention functions ignore them and mix the sequences.
_FLATTENED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}

# Attributes of PEFT's layers that switch adapters; the copies follow the originals in them.
_ADAPTERS = ("_disable_adapters", "_active_adapter")

_CAPTURE = "minilm_kernels_capture"


class _Reached(Exception):
    """Ends the model's forward; carries the projections' input, or (rotary="after") query, key and value."""


class _Probe(nn.Module):
    """Stands in a projection's place and hands its input to the extractor."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise _Reached(input)


class _Recorder(nn.Module):
    """Stands in a projection's place during the dry run: applies it and notes its arguments and output."""

    def __init__(self, projection: nn.Module, calls: list):
        super().__init__()
        self.projection, self.calls = projection, calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.projection(*args, **kwargs)
        self.calls.append(((*args, *kwargs.values()), output))
        return output


def _capture(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any):
    """An attention function that ends the forward with its (B, heads, S, head width) operands as (B, S, hidden)."""
    raise _Reached(*(x.transpose(1, 2).flatten(2) for x in (query, key, value)))


AttentionInterface.register(_CAPTURE, _capture)


class QKVExtractor(nn.Module):
    """The query, key and value projections of one layer: `extractor(**batch) -> QKV`.

    Works for BERT, RoBERTa, XLM-R, DistilBERT, ELECTRA, MPNet and families that share BERT's module names (the error
    for other families lists them), as base models or below a task head (the head is not run). With `projections` it
    works for any other model whose self-attention has three projection modules.

    Args:
        model: the model. It is left as it is: no hooks, no new attributes, no copied weights. The model is taken out of
            `torch.compile`, PEFT, sentence-transformers and AveragedModel; `extractor.model` is the one inside.
        layer: 1-based; negative counts from the last, so the default is the last layer.
        frozen: for teachers. The extractor always runs in evaluation mode and without gradient, and has no parameters,
            buffers or submodules, so that a module which holds it neither trains nor saves the teacher. The model
            itself keeps its mode and its `requires_grad`.
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
    `unused_parameters()` names the others. Gradient checkpointing, autocast and `torch.compile(fullgraph=True,
    dynamic=True)` work. Calls from several threads do not disturb each other.

    Wrap the extractor, not the model: `DistributedDataParallel(QKVExtractor(model))`. For FSDP2 make the extractor
    first, then `fully_shard` the layers in `extractor.base` and the extractor. Modules that are re-parametrised
    (pruning, weight norm, spectral norm) train through the parameters behind their weights.

    Modules and parameters are shared with the model: what changes a parameter in either is seen in both, as is moving
    or casting (`to`, `half`, ...), and `extractor.to()` and `extractor.train()`/`eval()` act on the whole model.
    `model.train()` and `model.eval()` decide about dropout in the extractor too: the last call counts. A module that
    registers both the student and its extractor holds every parameter twice, which safetensors refuses to save:
    register one of them. transformers' Trainer trains an extractor with `remove_unused_columns=False`, and resumes from
    its own checkpoints; `extractor.model.save_pretrained` saves the student itself.
    Replacing a module does *not* reach an extractor that exists: after `resize_token_embeddings`, a change of attention
    implementation, adapters or pruning, make a new one. A deep copy or a pickle of the extractor contains its model.

    Raises:
        TypeError: `model` is no module, `layer` no integer; calls with names that the model does not take.
        ValueError: a layer that does not exist (the message names the legal ones); a wrapper that cannot be taken off,
            sharded or offloaded parameters (it says what to do); an unknown architecture or wrong names (it shows how
            to name them); a layer with windowed, chunked, sparse, linear or other non-full attention, whose rows do
            not see what the relations are taken over; projections that do not share one input, are applied several
            times in one forward (layers that share their modules), or do not return (B, S, hidden); rotary="after"
            without rotary embeddings.
        RuntimeError: the dry run failed, or a forward that passed by the projections; a `forward` that was put on one
            of the model's modules and computes something else than that of the class.
    """

    # Without it transformers' Trainer takes **batch for loss arguments and does not divide by its accumulation steps.
    accepts_loss_kwargs = False

    model: nn.Module
    base: nn.Module
    projections: nn.ModuleList

    def __init__(
        self,
        model: nn.Module,
        layer: int = -1,
        frozen: bool = False,
        *,
        projections: Sequence[str] | None = None,
        rotary: Literal["before", "after"] = "before",
        example: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(frozen, bool):
            raise TypeError(f"frozen: expected a bool, got {frozen!r}")
        if rotary not in ("before", "after"):
            raise ValueError(f'rotary={rotary!r}: expected "before" or "after"')
        model = unwrap(model)
        root = _base_model(model)
        templates = _templates(model, root, projections)
        layers = templates[0].partition(".{i}.")[0]
        count = len(_submodule(root, layers)._modules)
        self.layer = resolve_layer(layer, count)  # 1-based
        self.frozen = frozen
        paths = [template.replace("{i}", str(self.layer - 1)) for template in templates]
        check_full_attention(root, templates[0].rpartition(".")[0], self.layer, count)
        modules = {path: _submodule(root, path) for path in paths}

        names = list(inspect.signature(type(root).forward).parameters.values())[1:]  # without self
        self._accepted = frozenset(p.name for p in names if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        takes_any = isinstance(root, PreTrainedModel) and any(p.kind is p.VAR_KEYWORD for p in names)
        # A cache would be filled, and recorded outputs would install hooks in the model.
        self._fixed = {
            name: False
            for name in ("use_cache", "output_attentions", "output_hidden_states")
            if name in self._accepted or takes_any
        }

        view = cut(root, layers, self.layer, {path: _Probe() for path in paths})
        with torch.inference_mode(False):
            example = self._example(root, example)
            if any(has_own_forward(module) for module in root.modules()):
                self._compare(root, pinned(view, {}) if frozen else view, modules[paths[0]], example)
            outputs, aliases = self._dry_run(root, modules, example)
            if rotary == "after":
                view = cut(root, layers, self.layer, _capturing_attention(root, paths))
                outputs, aliases = self._dry_run_after(view, example)
        found = leaves(outputs)
        reached = {original for original, alias in aliases.items() if id(alias) in found}

        self.__dict__["model"] = model  # unregistered: its other parameters are not the extractor's
        base = register_only(view, reached)
        applied = [modules[path] for path in paths] if rotary == "before" else []
        if frozen:
            made: dict[int, nn.Module] = {}
            self.__dict__["base"] = pinned(base, made)
            self.__dict__["projections"] = nn.ModuleList(pinned(module, made) for module in applied)
            self.training = False
        else:
            self.base, self.projections = base, nn.ModuleList(applied)
            self.training = model.training
        followed = _ADAPTERS if frozen else ("training", *_ADAPTERS)
        self._switches = switches(self.base, followed) + switches(self.projections, followed)

    def forward(self, *positional: Any, **batch: Any) -> QKV:
        if positional:
            raise TypeError("batch: give its entries by name, as in extractor(**batch)")
        unknown = [name for name in batch if name not in self._accepted and name not in _FOR_OTHERS]
        if flattened := [name for name in batch if name in _FLATTENED]:
            raise TypeError(
                f"batch: {', '.join(flattened)} describe a flattened batch, in which most attention functions mix the "
                "sequences; give (B, S) input_ids and attention_mask"
            )
        if unknown:
            raise TypeError(f"batch: unknown {', '.join(unknown)}; the model takes {', '.join(sorted(self._accepted))}")
        taken = {name: value for name, value in batch.items() if name in self._accepted}
        follow(self._switches)
        if self.frozen:
            with torch.no_grad():
                return self._extract(taken)
        return self._extract(taken)

    def _extract(self, batch: dict[str, Any]) -> QKV:
        try:
            self.base(**{**batch, **self._fixed})
        except _Reached as reached:
            found = reached.args
        else:
            raise RuntimeError(f"the model's forward ended without reaching the projections of layer {self.layer}")
        if len(found) == 3:
            return QKV(*found)
        query, key, value = self.projections
        return QKV(query(found[0]), key(found[0]), value(found[0]))

    def unused_parameters(self) -> list[str]:
        """Names, in `model.named_parameters()`, of the parameters that query, key and value do not depend on."""
        reached = {id(p) for module in (self.base, self.projections) for p in module.parameters()}
        return [name for name, p in self.model.named_parameters() if id(p) not in reached]

    def train(self, mode: bool = True) -> "QKVExtractor":
        """Sets the mode of the extractor and of the whole model; a frozen extractor stays in evaluation mode."""
        if self.frozen:
            return self
        self.model.train(mode)
        return super().train(mode)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Calls the model's method of this name; transformers' Trainer looks for it."""
        model: Any = self.model
        model.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Calls the model's method of this name; older versions of transformers' Trainer look for it."""
        model: Any = self.model
        model.gradient_checkpointing_enable(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "QKVExtractor":
        self.model._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"layer={self.layer}" + (", frozen=True" if self.frozen else "")

    def _example(self, root: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
        """The batch of the dry run, of tensors that autograd takes."""
        if example is None:
            if "input_ids" not in self._accepted:
                raise ValueError(
                    f"example: {type(root).__name__} takes no input_ids, so give a small batch of what it takes: "
                    f"{', '.join(sorted(self._accepted))}"
                )
            ids = torch.zeros(1, 2, dtype=torch.long, device=next(root.parameters()).device)
            example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            example = {name: value for name, value in example.items() if name in self._accepted}
        inference = {name for name, x in example.items() if isinstance(x, torch.Tensor) and x.is_inference()}
        return {name: x.clone() if name in inference else x for name, x in example.items()} | self._fixed

    def _dry_run(
        self, root: nn.Module, modules: Mapping[str, nn.Module], example: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], dict[int, nn.Parameter]]:
        """The checked outputs of the projections for one small batch, and the parameters that they depend on.

        Runs beyond the projections, to see whether they are applied again.
        """
        calls: dict[str, list] = {path: [] for path in modules}
        aliases: dict[int, nn.Parameter] = {}
        trial = private(graft(root, {path: _Recorder(m, calls[path]) for path, m in modules.items()}), aliases)
        try:
            with torch.enable_grad():
                trial(**example)
        except Exception as error:
            if not all(calls.values()):  # later errors do not matter: an encoder may run without its decoder's inputs
                raise RuntimeError(
                    f"the dry run over {type(root).__name__} failed ({error}); if the batch is the reason, give a "
                    "small one that the model takes as example=..."
                ) from error
        if not all(calls.values()):
            raise RuntimeError(f"the forward of {type(root).__name__} passed by the named projections")
        inputs = []
        for path, found in calls.items():
            arguments, output = found[0]
            if len(found) > 1:
                raise ValueError(
                    f"layer={self.layer}: {path} is applied {len(found)} times in one forward: layers that share "
                    "their modules cannot be extracted"
                )
            if len(arguments) != 1 or not isinstance(output, torch.Tensor):
                kind = type(modules[path]).__name__
                raise ValueError(
                    f"projections: {path} ({kind}) takes {len(arguments)} arguments and returns a "
                    f"{type(output).__name__}; expected a module of one tensor that returns a tensor"
                )
            shape = getattr(example.get("input_ids"), "shape", output.shape[:-1])
            if output.dim() != 3 or output.shape[:-1] != shape:
                raise ValueError(
                    f"projections: {path} returns {tuple(output.shape)} for tokens of {tuple(shape)}; expected "
                    "(B, S, hidden)"
                )
            inputs.append(arguments[0])
        if any(x is not inputs[0] and (x.shape != inputs[0].shape or not torch.equal(x, inputs[0])) for x in inputs):
            raise ValueError(f"projections: {', '.join(calls)} do not get one input: this is no self-attention")
        return [found[0][1] for found in calls.values()], aliases

    def _dry_run_after(self, view: nn.Module, example: Mapping[str, Any]) -> tuple[list[torch.Tensor], dict]:
        """The same for rotary="after", where queries and keys may depend on further parameters, as of a norm."""
        aliases: dict[int, nn.Parameter] = {}
        try:
            with torch.enable_grad():
                private(view, aliases)(**example)
        except _Reached as reached:
            return list(reached.args), aliases
        raise RuntimeError(f'rotary="after": {type(view).__name__} passed by the attention function of its config')

    def _compare(self, root: nn.Module, view: nn.Module, projection: nn.Module, example: Mapping[str, Any]) -> None:
        """Holds the view to the model where modules of the model have a `forward` of their own.

        The model itself is run as far as the projection, in evaluation mode; its modes and hooks are put back.
        """

        def stop(_: nn.Module, arguments: tuple) -> None:
            raise _Reached(*arguments)

        modes = {module: module.training for module in (*root.modules(), *view.modules())}
        handle = projection.register_forward_pre_hook(stop)
        found = []
        try:
            for model in (root, view):
                model.eval()
                try:
                    with torch.no_grad():
                        model(**example)
                except _Reached as reached:
                    found.append(reached.args[0])
        finally:
            handle.remove()
            for module, mode in modes.items():
                module.training = mode
        close = len(found) == 2 and found[0].shape == found[1].shape
        if not close or not torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6):
            names = [name or "the model" for name, module in root.named_modules() if has_own_forward(module)]
            raise RuntimeError(
                f"model: the forward that was put on {', '.join(names[:3])} reaches the projections of layer "
                f"{self.layer} with other values than the forward of the class; make the extractor before it is put "
                "there, or remove it"
            )


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
    projections = [name.replace("_orig_mod.", "") for name in projections]  # of compiled modules
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


def _capturing_attention(root: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """The attention module of the layer, with the capturing function as its attention implementation."""
    path = paths[0].rpartition(".")[0]
    attention = root.get_submodule(path)
    if getattr(nearest_config(root, path), "rope_parameters", None) is None or not hasattr(attention, "config"):
        raise ValueError(f'rotary="after": {type(root).__name__} has no rotary embedding that can be applied')
    return {path: with_attention(attention, _CAPTURE)}
