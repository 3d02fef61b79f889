"""`QKVExtractor`: the queries, keys and values of one Transformer layer, computed without the rest of the model.

The extractor runs a *view* of the model: a copy of the containers from the base model down to the attention of the
chosen layer, which shares every other module and every parameter with the model. In the view, probes replace the three
projections. The first probe that is reached raises a private exception with its input, and the extractor applies the
three projections to that input. The model itself is not changed, and calls keep no state.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from minilm_kernels._architectures import find_stack, merge_heads, submodule
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
    unrolled,
    with_attention,
)
from minilm_kernels._wrappers import is_pretrained_model, unwrap
from minilm_kernels.losses import QKV
from minilm_kernels.packed.models import BORDERS, KEYWORDS, borders, register, takes_borders

__all__ = ["QKV", "QKVExtractor"]

# Batch entries that tokenizers, collators and sentence-transformers add for other purposes. They are ignored if the
# base model does not take them.
FOR_OTHERS = {"labels", "label", "label_ids", "next_sentence_label", "start_positions", "end_positions"}
FOR_OTHERS |= {"num_items_in_batch", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"}
FOR_OTHERS |= {"overflow_to_sample_mapping", "modality", "prompt_length", "task"}
# Entries of flattened batches. Most attention functions ignore them, so that tokens attend to other sequences.
_FLATTENED = {*BORDERS, "seq_idx"}

# Attributes of PEFT's layers that switch adapters. The copies in the view get their values from the originals.
_ADAPTERS = ("_disable_adapters", "_active_adapter")

_CAPTURE = "minilm_kernels_capture"


class _Reached(Exception):
    """Ends the forward. The arguments are the input of the projections or, for rotary="after", query, key and value."""


class _Probe(nn.Module):
    """Replaces a projection and passes its input to the extractor."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        raise _Reached(input)


class _Observer(nn.Module):
    """Replaces a projection during the dry run: applies it and keeps its arguments and output."""

    def __init__(self, projection: nn.Module, calls: list):
        super().__init__()
        self.projection, self.calls = projection, calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.projection(*args, **kwargs)
        self.calls.append(((*args, *kwargs.values()), output))
        return output


def _capture(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any):
    """An attention function that ends the forward with its operands, (B, heads, S, head width) to (B, S, hidden)."""
    raise _Reached(*merge_heads(query, key, value))


def _register_capture() -> None:
    """Makes `_capture` known to transformers as an attention implementation."""
    from transformers import AttentionInterface

    AttentionInterface.register(_CAPTURE, _capture)


class QKVExtractor(nn.Module):
    """Computes the queries, keys and values of one Transformer layer, without running the rest of the model.

    Encoders and decoders whose projections have usual names (`query`, `q_proj`, `q_lin`, `Wqkv`, `c_attn`, ...) are
    supported directly, as base models or with a task head, which is not run. With `projections`, any other model works
    whose self-attention has three projections of one input, or one for all three. `record_qkv` is for losses that need
    the rest of the forward, too, and for models whose projections have different inputs.

    The model stays as it is: it gets no hooks, no new attributes and no copied weights. Only the modules before the
    projections run, so only their parameters receive gradients, and `parameters()` returns exactly these and the
    parameters of the three projections. The extractor therefore trains under `DistributedDataParallel` without
    `find_unused_parameters`, provided that the loss uses all three outputs. Wrap the extractor instead of the model:
    `DistributedDataParallel(QKVExtractor(model))`. For FSDP2, create the extractor first, then apply `fully_shard` to
    the layers in `extractor.base` and to the extractor. Gradient checkpointing, autocast and
    `torch.compile(fullgraph=True, dynamic=True)` are supported, and calls from several threads are independent.

    The extractor shares its modules and parameters with the model. Moving or casting either of them affects both.
    `extractor.train()` and `extractor.eval()` act on the whole model, and `model.train()` and `model.eval()` on the
    extractor. Replacing a module of the model does *not* reach an existing extractor: create a new one after
    `resize_token_embeddings`, a change of the attention implementation, adding adapters or pruning. A deep copy or a
    pickle of the extractor contains its model. A module that registers both the student and its extractor has every
    parameter twice, which safetensors refuses to save: register one of them. transformers' Trainer trains an extractor
    with `remove_unused_columns=False`; `extractor.model.save_pretrained` saves the student.

    Args:
        model: the model. torch.compile, PEFT, sentence-transformers and AveragedModel wrappers are removed;
            `extractor.model` is the model inside.
        layer: the layer, counted from 1. Negative numbers count from the last layer; -1 is the last.
        frozen: use the extractor as a teacher. It always runs in evaluation mode and without gradient, and has no
            parameters, buffers or submodules, so that a module which contains it neither trains nor saves the teacher.
            The mode and `requires_grad` of the model itself do not change.
        projections: for models with several stacks of layers, the name of one, such as "encoder". For models with
            unusual names, the names of the query, key and value modules as in `model.named_modules()`, with `{i}` for
            the index of the layer in its list (0 for layer 1). For a module that projects all three, its name and the
            order of its output, such as `{"layers.{i}.attention.to_qkv": "blocks"}`: "blocks" is [query | key | value],
            each over all heads; "heads" has the queries of each key head, its key and its value side by side; "codegen"
            has four groups of [query | value | key]. The prefix of a base model ("model.") may be left out.
        rotary: "before" returns the output of the projections. "after" returns the operands of the attention, to which
            rotary embeddings and query and key norms have been applied. Models whose attention goes through
            transformers' attention interface have it.
        example: the batch of a dry run that determines the reached parameters, by default two tokens. Required
            for models that take no `input_ids`.

    Attributes:
        model: the model without wrappers.
        layer: the layer, counted from 1.
        base: the part of the model that runs.
        projections: the query, key and value modules, or the one that projects all three.
        quantity: the quantity that is computed. "projection" is the output of the projections, and "content" the same
            in a model that adds terms of the relative position to its scores (DeBERTa, T5, MPNet). With
            `rotary="after"`, it lists what has been applied: "normed" (query and key norms, which change the
            temperature of the relations, as in Qwen3), "scaled" (queries times head width**-0.5, as in Whisper),
            "rotated", "value-normed", "value-scaled". Relations of different quantities of teacher and student can be
            distilled, but they are different distributions even for equal models.

    Raises:
        TypeError: `model` is not a module, or `layer` is not an integer.
        ValueError: the layer does not exist; a wrapper cannot be removed, or parameters are sharded or offloaded; the
            architecture is unknown, has several stacks, or a name is wrong; the layer has windowed, sparse, linear or
            other partial attention, so that its rows do not attend to all tokens over which the relations are defined;
            the projections have different inputs, run several times in one forward, or do not return (B, S, hidden); a
            fused projection has another order than the given one; `rotary="after"` without the attention interface, or
            with scores that have further terms. The message names the valid choices or a remedy.
        RuntimeError: the dry run failed or did not reach the projections, or a module of the model has a replaced
            `forward` with other results than that of its class.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from minilm_kernels import QKVExtractor
        >>> sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
        >>> student = BertModel(BertConfig(vocab_size=100, **sizes))
        >>> extractor = QKVExtractor(student, layer=2)
        >>> qkv = extractor(input_ids=torch.ones(2, 5, dtype=torch.long))
        >>> qkv.query.shape, qkv.query.requires_grad
        (torch.Size([2, 5, 24]), True)
        >>> extractor.unused_parameters()[0]
        'encoder.layer.1.attention.output.dense.weight'

        Modules can be named, which other models need:

        >>> from transformers import LlamaConfig, LlamaModel
        >>> llama = LlamaModel(LlamaConfig(vocab_size=100, num_key_value_heads=2, **sizes))
        >>> names = [f"layers.{{i}}.self_attn.{p}_proj" for p in "qkv"]
        >>> teacher = QKVExtractor(llama, frozen=True, projections=names)
        >>> teacher(input_ids=torch.ones(2, 5, dtype=torch.long)).key.shape
        torch.Size([2, 5, 24])
    """

    # Otherwise transformers' Trainer mistakes **batch for loss arguments and does not divide by the accumulation steps.
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
        projections: str | Sequence[str] | Mapping[str, str] | None = None,
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
        stack = find_stack(model, projections)
        self.layer = stack.resolve(layer)  # from 1
        self.quantity = stack.quantity(self.layer, rotary)
        if rotary == "after":
            stack.check_operands(self.layer)
        if stack.order == "latent":
            raise ValueError(
                f"model: {type(model).__name__} has multi-head latent attention, whose projections have different "
                "inputs, so that it cannot be cut before them. Record them with record_qkv"
            )
        root, layers = stack.root, stack.layers
        if stack.count != stack.groups:
            order = [stack.group(i + 1) for i in range(stack.count)]
            root = unrolled(root, layers, order, "num_hidden_groups")
        self.frozen, self._rotary = frozen, rotary
        self._paths = paths = [template.replace("{i}", str(self.layer - 1)) for template in stack.templates]
        modules = {path: submodule(root, path) for path in paths}

        names = list(inspect.signature(type(root).forward).parameters.values())[1:]  # without self
        self._accepted = frozenset(p.name for p in names if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        takes_any = is_pretrained_model(root) and any(p.kind is p.VAR_KEYWORD for p in names)
        # Without these arguments, the model would fill a cache, and recording outputs would install hooks in it.
        self._fixed = {
            name: False
            for name in ("use_cache", "output_attentions", "output_hidden_states")
            if name in self._accepted or takes_any
        }

        self._divide = replace(stack.division(self.layer), attention=paths[0].rpartition(".")[0])
        view = cut(root, layers, self.layer, {path: _Probe() for path in paths})
        with torch.inference_mode(False):
            example = self._example(root, example)
            if any(has_own_forward(module) for module in root.modules()):
                self._compare(root, pinned(view, {}) if frozen else view, modules[paths[0]], example)
            outputs, aliases = self._dry_run(root, modules, example)
            if rotary == "after" or (stack.order and not stack.operands_reason(self.layer)):
                attention = cut(root, layers, self.layer, _capturing_attention(root, self._divide.attention))
                operands, aliases_after = self._dry_run_after(attention, example)
                if stack.order:
                    normed = "normed" in stack.quantity(self.layer, "after")
                    self._check_division(paths[0], outputs, operands, normed)
                if rotary == "after":
                    view, outputs, aliases = attention, operands, aliases_after
        found = leaves(outputs)
        reached = {original for original, alias in aliases.items() if id(alias) in found}

        self.__dict__["model"] = model  # not registered, because its other parameters are not the extractor's
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
        """Computes queries, keys and values.

        Args:
            batch: keyword arguments of the base model's forward, usually `input_ids` and `attention_mask`, (B, S).
                Entries that other code uses (`labels`, `token_type_ids` if the model has none, ...) are ignored. After
                `use_packed_attention(model)`, one row (1, T) with the borders of its documents.

        Returns:
            Query, key and value, (B, S, hidden) in the dtype of the projections. With grouped-query attention, key and
            value are narrower: (B, S, key heads x head width).

        Raises:
            TypeError: an argument that the model does not take, such as a misspelt `attention_mask`.
        """
        if positional:
            raise TypeError("batch: give its entries by name, as in extractor(**batch)")
        keywords = KEYWORDS if takes_borders(self.base) else frozenset()
        accepted = self._accepted | keywords
        unknown = [name for name in batch if name not in accepted and name not in FOR_OTHERS]
        if flattened := [name for name in batch if name in _FLATTENED - keywords]:
            raise TypeError(
                f"batch: {', '.join(flattened)} describe a flattened batch, in which most attention functions mix the "
                "sequences; call minilm_kernels.packed.use_packed_attention(model) first, or give input_ids and "
                "attention_mask of shape (B, S)"
            )
        if unknown:
            raise TypeError(f"batch: unknown {', '.join(unknown)}; the model takes {', '.join(sorted(accepted))}")
        taken = {name: value for name, value in batch.items() if name in accepted}
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
        return QKV(*self._divide(self.base, [projection(found[0]) for projection in self.projections]))

    def unused_parameters(self) -> list[str]:
        """Names of the model's parameters on which query, key and value do not depend.

        The names are those of `extractor.model.named_parameters()`. Distillation does not train these parameters.
        """
        reached = {id(p) for module in (self.base, self.projections) for p in module.parameters()}
        return [name for name, p in self.model.named_parameters() if id(p) not in reached]

    def train(self, mode: bool = True) -> "QKVExtractor":
        """Sets the mode of the extractor and of the whole model. A frozen extractor remains in evaluation mode."""
        if self.frozen:
            return self
        self.model.train(mode)
        return super().train(mode)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Calls the method of the model. transformers' Trainer uses it."""
        model: Any = self.model
        model.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Calls the method of the model. Older versions of transformers' Trainer use it."""
        model: Any = self.model
        model.gradient_checkpointing_enable(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Unpickled, maybe in another process.
        if self._rotary == "after":
            _register_capture()
        if takes_borders(self.base):
            register()

    def _apply(self, fn: Any, recurse: bool = True) -> "QKVExtractor":
        self.model._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"layer={self.layer}" + (", frozen=True" if self.frozen else "")

    def _example(self, root: nn.Module, example: Mapping[str, Any] | None) -> dict[str, Any]:
        """The batch of the dry run, without inference tensors, which autograd does not accept."""
        if example is None:
            if "input_ids" not in self._accepted:
                raise ValueError(
                    f"example: {type(root).__name__} takes no input_ids; give a small batch of its arguments: "
                    f"{', '.join(sorted(self._accepted))}"
                )
            padding = getattr(getattr(root, "config", None), "pad_token_id", None)  # its embedding is often 0
            device = next(root.parameters()).device
            ids = torch.tensor([[i for i in range(3) if i != padding][:2]], device=device)
            if takes_borders(root):
                cu_seqlens = torch.tensor([0, 2], dtype=torch.int32, device=device)
                example = {"input_ids": ids, **borders(cu_seqlens, 2)}
            else:
                example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                example = {name: value for name, value in example.items() if name in self._accepted}
        inference = {name for name, x in example.items() if isinstance(x, torch.Tensor) and x.is_inference()}
        return {name: x.clone() if name in inference else x for name, x in example.items()} | self._fixed

    def _dry_run(
        self, root: nn.Module, modules: Mapping[str, nn.Module], example: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], dict[int, nn.Parameter]]:
        """Runs the whole model on a small batch, to check that each projection runs once and that they fit each other.

        Returns:
            The outputs of the projections, and the parameters of the run: id of the original parameter to its alias.
        """
        calls: dict[str, list] = {path: [] for path in modules}
        aliases: dict[int, nn.Parameter] = {}
        trial = private(graft(root, {path: _Observer(m, calls[path]) for path, m in modules.items()}), aliases)
        try:
            with torch.enable_grad():
                trial(**example)
        except Exception as error:
            if not all(calls.values()):  # later errors do not matter, such as missing decoder inputs
                raise RuntimeError(
                    f"the dry run of {type(root).__name__} failed ({error}); if the batch is the reason, give a small "
                    "valid one as example=..."
                ) from error
        if not all(calls.values()):
            raise RuntimeError(f"the forward of {type(root).__name__} did not run the named projections")
        inputs = []
        for path, found in calls.items():
            arguments, output = found[0]
            if len(found) > 1 and path == list(calls)[-1]:  # DeBERTa also projects positions to queries and keys
                raise ValueError(
                    f"layer={self.layer}: {path} is applied {len(found)} times in one forward, as if several layers "
                    "shared it. Name the layers by their own modules, or record them with record_qkv"
                )
            if len(arguments) != 1 or not isinstance(output, torch.Tensor):
                kind = type(modules[path]).__name__
                raise ValueError(
                    f"projections: {path} ({kind}) takes {len(arguments)} arguments and returns a "
                    f"{type(output).__name__}; expected a module that takes and returns one tensor"
                )
            shape = getattr(example.get("input_ids"), "shape", output.shape[:-1])
            if output.dim() != 3 or output.shape[:-1] != shape:
                raise ValueError(
                    f"projections: {path} returns {tuple(output.shape)} for tokens of {tuple(shape)}; expected "
                    "(B, S, hidden)"
                )
            inputs.append(arguments[0])
        if any(x is not inputs[0] and (x.shape != inputs[0].shape or not torch.equal(x, inputs[0])) for x in inputs):
            raise ValueError(
                f"projections: {', '.join(calls)} have different inputs, so that the model cannot be cut before them. "
                "Record them with record_qkv"
            )
        return self._divide(trial, [calls[path][0][1] for path in self._paths]), aliases

    def _dry_run_after(self, view: nn.Module, example: Mapping[str, Any]) -> tuple[list[torch.Tensor], dict]:
        """The dry run for rotary="after", where queries and keys may depend on more parameters, such as a norm's."""
        aliases: dict[int, nn.Parameter] = {}
        try:
            with torch.enable_grad():
                private(view, aliases)(**example)
        except _Reached as reached:
            return list(reached.args), aliases
        raise RuntimeError(f'rotary="after": {type(view).__name__} did not run the attention function of its config')

    def _check_division(
        self, path: str, divided: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], normed: bool
    ) -> None:
        """Compares the parts of a fused projection with the operands of the attention.

        The values must be equal. A rotation or a scale keeps the ratios of the norms of all heads and positions in
        queries, and in keys. With query and key norms, only the values can be compared.

        Raises:
            ValueError: they differ.
        """
        equal = torch.equal(divided[2], operands[2])
        for heads, part, operand in zip(self._divide.sizes, divided[:2], operands[:2], strict=True):
            before, after = (x.detach().float().unflatten(-1, (heads, -1)).norm(dim=-1) for x in (part, operand))
            scale = after.mean() / before.mean().clamp_min(1e-30)
            equal = equal and (normed or bool((after - scale * before).abs().max() <= 0.05 * after.mean()))
        if not equal:
            raise ValueError(
                f"projections: the output of {path} has another order than {self._divide.order!r}: its parts are not "
                "the operands of the attention"
            )

    def _compare(self, root: nn.Module, view: nn.Module, projection: nn.Module, example: Mapping[str, Any]) -> None:
        """Compares the view with the model, for models with a replaced `forward` on some module.

        The model runs up to the projection in evaluation mode. Its modes and hooks are restored.

        Raises:
            RuntimeError: the inputs of the projection differ.
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
                f"model: the replaced forward of {', '.join(names[:3])} changes the inputs of the projections of layer "
                f"{self.layer}; create the extractor before the forward is replaced, or restore it"
            )


def _capturing_attention(root: nn.Module, path: str) -> dict[str, nn.Module]:
    """The path of an attention module to a copy of it that has `_capture` as its attention implementation."""
    _register_capture()
    return {path: with_attention(root.get_submodule(path), _CAPTURE)}
