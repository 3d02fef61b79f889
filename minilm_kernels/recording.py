"""`record_qkv`: the queries, keys and values of layers, kept while the model's own forward runs.

For rotary="before", the projections get a `forward` on the instance, which keeps their output. For "after", the
attention module gets a config of its own, which names an attention function that keeps its operands. Forward hooks are
not enough: torch.compile does not check them before it runs compiled code again, so layers that share code lose them.
"""

import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from minilm_kernels._architectures import Division, defined_beside, find_stack, merge_heads, submodule
from minilm_kernels._module_view import config_with_attention
from minilm_kernels._wrappers import compiled_original, unwrap
from minilm_kernels.losses import QKV

__all__ = ["record_qkv"]

_ATTENTION = "minilm_kernels_record"
# Attributes of recorded modules, which a deep copy of the model has, too.
_ATTEND, _FIRST_CONFIG, _FIRST_FORWARD = "_recorded_attention", "_unrecorded_config", "_unrecorded_forward"

_Key = tuple[int, int]  # layer, and the position of the module among the layer's projections


class _Outputs:
    """The recorded outputs since the last `pop`, and the number of calls of their modules."""

    def __init__(self) -> None:
        self.found: dict[_Key, Any] = {}
        self.calls: dict[_Key, int] = {}

    def put(self, key: _Key, call: int, number: int, output: Any) -> None:
        """Keeps the output of the module's call with index `call`, and counts up to one call more than `number`."""
        calls = self.calls.get(key, 0)
        if calls == call:
            self.found[key] = output
        if calls <= number:  # torch.compile compiles again for each count
            self.calls[key] = calls + 1

    def clear(self) -> None:
        self.found.clear()
        self.calls.clear()


class _ThreadOutputs(_Outputs, threading.local):
    """Outputs of the calling thread, and the modules that `until_recorded` awaits."""

    awaited: set[tuple[int, _Key]] | None = None


class _Recorded(Exception):
    """Ends a forward in `until_recorded`."""


@contextmanager
def until_recorded(*recorders: "record_qkv") -> Iterator[None]:
    """Ends a forward in this context as soon as all recorders have their outputs, without an error.

    Code that torch.compile has compiled and models with fully_shard, whose state would be incomplete, run to the end.
    """
    whole = any(_is_sharded(recorder._stack.root.modules()) for recorder in recorders)
    awaited = {(id(recorder), key) for recorder in recorders for key in recorder._modules}
    for recorder in recorders:
        recorder._eager.awaited = None if whole else awaited
    try:
        with suppress(_Recorded):
            yield
    finally:
        for recorder in recorders:
            recorder._eager.awaited = None


class _KeepActivations:
    """A forward pre-hook of the base model that excludes the recorded layers from gradient checkpointing.

    A checkpointed layer runs twice, without a graph the first time if checkpointing is reentrant, and is closed to
    torch.compile's side effects. The setting is changed at each forward because it may be enabled after the recorder.
    """

    def __init__(self, base: nn.Module, layers: list[Any]):
        self.layers, self.changed = layers, list[Any]()
        self.handle = base.register_forward_pre_hook(self)

    def __call__(self, base: nn.Module, args: Any) -> None:
        for layer in self.layers:
            if getattr(layer, "gradient_checkpointing", False):
                layer.gradient_checkpointing = False
                self.changed.append(layer)

    def remove(self, base: nn.Module) -> None:
        self.handle.remove()
        others = [m for m in base.modules() if "gradient_checkpointing" in vars(m) and m not in self.changed]
        if not others or any(module.gradient_checkpointing for module in others):  # otherwise disabled since
            for layer in self.changed:
                layer.gradient_checkpointing = True


class _OutputWatch:
    """A forward hook of the base model, which notes whether a backward comes through the output of the last forward.

    DistributedDataParallel and FSDP2 prepare for the backward in the gradient of the output. The list `passed` is empty
    until the backward has reached the output; it is None if nothing prepares for it.
    """

    def __init__(self, base: nn.Module, layers: list[nn.Module]):
        self.layers = layers
        self.passed: list[bool] | None = None
        self.handle = base.register_forward_hook(self)

    def __call__(self, base: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        self.passed = None
        if self._synchronized(base):
            self.passed = passed = list[bool]()
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: passed.append(True))

    def _synchronized(self, base: nn.Module) -> bool:
        inside_ddp = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
        return inside_ddp or _is_sharded((base, *self.layers))

    def check(self, recorded: torch.Tensor) -> None:
        """Lets the backward raise an error if it reaches a recorded tensor, but not the output behind it."""
        passed = self.passed
        if passed is not None and recorded.requires_grad:
            recorded.register_hook(lambda _: _require(passed))


def _is_sharded(modules: Iterable[nn.Module]) -> bool:
    """True if `fully_shard` has been applied to one of the modules."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in modules)


def _require(passed: list[bool]) -> None:
    if not passed:
        raise RuntimeError(
            "the loss does not depend on the output of the model, without which DistributedDataParallel and FSDP2 "
            "compute wrong gradients. For a relation loss alone, use QKVExtractor, or add 0.0 * output.sum()"
        )


def _attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention function that transformers calls for a recorded module, and for deep copies of one."""
    return getattr(module, _ATTEND)(*args, **kwargs)


def _sinks(module: nn.Module, name: str, wrapped: Callable, operands: bool) -> list:
    """Sets a method that calls `wrapped` and reports to the recorders in the returned list.

    It is bound, so that a deep copy of the model uses its own weights.
    """
    sinks: list[tuple[record_qkv, _Key]] = []

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = wrapped(self, *args, **kwargs)
        for recorder, key in sinks:
            recorder._put(self is module, key, args[:3] if operands else output)
        if not torch.compiler.is_compiling():
            ends = [recorder._ends_forward(key) for recorder, key in sinks]  # all of them count
            if any(ends):
                raise _Recorded
        return output

    method.__name__ = name  # by which a pickle of the model refers to it
    method.owner, method.sinks = module, sinks  # type: ignore[attr-defined]
    vars(module)[name] = types.MethodType(method, module)
    return sinks


def _record_forward(module: nn.Module) -> list:
    """Makes a projection report its output; returns the list of its recorders."""
    forward: Any = vars(module).get("forward")
    if hasattr(forward, "sinks"):
        if forward.owner is module:
            return forward.sinks
    elif forward is not None:  # accelerate's, for example
        vars(module)[_FIRST_FORWARD] = forward
    if _FIRST_FORWARD in vars(module):
        return _sinks(
            module, "forward", lambda self, *args, **kwargs: vars(self)[_FIRST_FORWARD](*args, **kwargs), False
        )
    return _sinks(module, "forward", lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), False)


def _record_attention(module: Any) -> list:
    """Makes an attention module report the operands of its attention; returns the list of its recorders."""
    from transformers import AttentionInterface

    if _FIRST_CONFIG in vars(module):
        method = vars(module)[_ATTEND]
        if method.owner is module:
            return method.sinks
    else:
        AttentionInterface.register(_ATTENTION, _attention)
        vars(module)[_FIRST_CONFIG] = module.config
        vars(module)["config"] = config_with_attention(module.config, _ATTENTION)
    chosen = vars(module)[_FIRST_CONFIG]._attn_implementation
    eager = defined_beside(module, "eager_attention_forward")
    return _sinks(module, _ATTEND, AttentionInterface().get_interface(chosen, eager), True)


def _restore(module: Any, name: str, sinks: list) -> None:
    """Undoes `_record_forward` or `_record_attention`, unless something else has replaced the method since."""
    if getattr(vars(module).get(name), "sinks", None) is not sinks:
        return
    del vars(module)[name]
    if name == _ATTEND:
        vars(module)["config"] = vars(module).pop(_FIRST_CONFIG)
    elif _FIRST_FORWARD in vars(module):
        vars(module)["forward"] = vars(module).pop(_FIRST_FORWARD)


def _called(model: nn.Module, base: nn.Module) -> nn.Module:
    """The module whose call runs the base model. sentence-transformers calls the model's `forward`, without hooks."""
    callers = [module for module in model.modules() if base in module.children()]
    return next((m for m in callers if type(m).__module__.partition(".")[0] == "sentence_transformers"), base)


def _uses_dropout(root: nn.Module) -> bool:
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or isinstance(module, nn.Dropout))
        for module in root.modules()
        for name, value in vars(module).items()
    )


class record_qkv:
    """Records the queries, keys and values of layers while the model's own forward runs, for a loss beside another one.

    The forward runs to its end, through whatever is around the model: DistributedDataParallel, FSDP2, torch.compile
    (of the model, of layers, with `fullgraph=True`), gradient checkpointing, autocast, PEFT and sentence-transformers.
    The recorder may be created before or after the model is wrapped, sharded or compiled; create it after adapters are
    added. `QKVExtractor` is for distillation alone: it does not run the layers after the recorded one.

    Use it as a context manager, or call `remove()`, which leaves the model as it was. `pop()` belongs after every
    forward. Each thread has its own recordings; compiled code, however, must run in one thread at a time. Recorders
    of the same layers, deep copies of the model and other models do not disturb each other. Recorded layers are not
    checkpointed, so their activations stay in memory until the backward.

    Under DistributedDataParallel and FSDP2, the loss must depend on the output of the model, because they prepare for
    the backward there; otherwise the backward raises an error (under `torch.compile` an error of torch, if any). For a
    relation loss alone, use `QKVExtractor` or add `0.0 * output.sum()`.

    Args:
        model: the model, in its wrappers or without them.
        layers: the layers, counted from 1. Negative numbers count from the last layer; -1 is the last.
        rotary: "before" records the outputs of the projections, as `QKVExtractor` returns them. "after" records the
            operands of the attention, to which rotary embeddings, query, key and value norms, and in some models (ESM,
            OPT, Whisper) the scale of the queries have been applied. Models whose attention goes through transformers'
            attention interface have it.
        projections: the name of a stack of layers, the names of the projections, or a fused projection and its order,
            as in `QKVExtractor`, which also checks the order.

    Attributes:
        quantity: the quantity of each layer as asked for, see `QKVExtractor`.

    Raises:
        TypeError: `model` is not a module, or a layer is not an integer.
        ValueError: a layer does not exist or has windowed, sparse or other partial attention; the architecture is
            unknown; the wrapper is DataParallel or FSDP1; `rotary="after"` without attention interface, or with scores
            that have further terms than the product of queries and keys.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from minilm_kernels import MiniLMv2Loss, record_qkv
        >>> sizes = dict(vocab_size=100, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
        >>> teacher = BertForMaskedLM(BertConfig(hidden_size=48, **sizes)).eval()
        >>> student = BertForMaskedLM(BertConfig(hidden_size=24, **sizes))
        >>> ids, loss_fn = torch.randint(100, (2, 5)), MiniLMv2Loss(num_relation_heads=2)
        >>> with record_qkv(teacher, [-1]) as target, record_qkv(student, [2, -1]) as recorder:
        ...     with torch.no_grad():
        ...         _ = teacher(input_ids=ids)
        ...     masked_lm = student(input_ids=ids, labels=ids).loss
        ...     recorded = recorder.pop()
        ...     loss = masked_lm + loss_fn(target.pop()[-1], recorded[-1])
        ...     loss.backward()
        >>> sorted(recorded), recorded[2].query.shape
        ([-1, 2], torch.Size([2, 5, 24]))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] = (-1,),
        rotary: Literal["before", "after"] = "before",
        *,
        projections: str | Sequence[str] | Mapping[str, str] | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if rotary not in ("before", "after"):
            raise ValueError(f'rotary={rotary!r}: expected "before" or "after"')
        if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
            raise ValueError(f"layers={layers!r}: expected at least one number, such as [-1]")
        self._stack = stack = find_stack(unwrap(model, runs_whole=True), projections)
        self._numbers = {layer: stack.resolve(layer) for layer in layers}
        self._rotary, self._removed = rotary, False
        self._compiled, self._eager = _Outputs(), _ThreadOutputs()
        self._modules: dict[_Key, tuple[str, nn.Module]] = {}
        self._parents: dict[str, tuple[nn.Module, str]] = {}
        self._calls: dict[_Key, tuple[int, int]] = {}
        self._divisions: dict[int, Division] = {}
        containers = []
        for layer in dict.fromkeys(self._numbers.values()):
            templates = stack.templates
            if rotary == "after":
                stack.check_operands(layer)
                templates = (stack.attention,)
            else:
                self._divisions[layer] = stack.division(layer)
            for position, template in enumerate(templates):
                path = stack.at(template, layer)
                module = compiled_original(submodule(stack.root, path))
                if isinstance(module, nn.Conv1d):
                    raise ValueError(f"layer={layer}: {path} is a Conv1d, which returns (B, hidden, S)")
                if any(module is other and path != at for (i, _), (at, other) in self._modules.items() if i == layer):
                    raise ValueError(f"layer={layer}: {path} has the same module as another projection of the layer")
                self._modules[layer, position] = path, module
                self._calls[layer, position] = stack.calls(template, layer)
                parent, _, name = path.rpartition(".")
                self._parents[path] = submodule(stack.root, parent), name
            containers += self._containers(layer, path)
        self.quantity = {layer: stack.quantity(number, rotary) for layer, number in self._numbers.items()}
        self._lists: list[tuple[nn.Module, list]] = []
        for key, (_, module) in self._modules.items():
            sinks = _record_forward(module) if rotary == "before" else _record_attention(module)
            sinks.append((self, key))
            self._lists.append((module, sinks))
        called = _called(model, self._stack.root)
        self._activations = _KeepActivations(called, containers)
        self._watch = _OutputWatch(called, [self._stack.root, *containers])

    def pop(self) -> dict[int, QKV]:
        """Returns the recordings of the forward since the last `pop()` or `clear()`, and forgets them.

        Returns:
            Queries, keys and values by the layer's number as in `layers`, each (B, S, hidden), with the graph of the
            forward. With grouped-query attention, keys and values are narrower.

        Raises:
            RuntimeError: since the last call, a layer did not run in this thread or ran more than once (a second
                forward); a recorded module has been replaced (by adapters, for
                example); the recorder was removed; the model is in training mode with dropout, or with gradients
                enabled, and the forward had no gradients (a teacher without `eval()`, or reentrant checkpointing).
        """
        found, calls = self._take()
        if self._removed:
            raise RuntimeError("pop: the recorder was removed from the model")
        for (layer, _), (path, module) in self._modules.items():
            parent, name = self._parents[path]
            if compiled_original(getattr(parent, name)) is not module:
                raise RuntimeError(
                    f"layer {layer}: {path} was replaced after the recorder was created, by adapters for example; "
                    "create the recorder after that"
                )
        for layer, position in self._modules:
            if (layer, position) not in found:
                raise RuntimeError(
                    f"layer {layer} did not run since the last pop(): call the model that is recorded, not a copy, in "
                    "this thread, and pop() once after it"
                )
        # Queries and keys may be projected again: DeBERTa also projects its relative positions.
        for last in {key[0]: key for key in self._modules}.values():
            if calls[last] > self._calls[last][1]:
                raise RuntimeError(
                    f"layer {last[0]} ran more than once since the last pop(): call pop() or clear() after each forward"
                )
        numbers = {layer: self._result(layer, found) for layer in dict.fromkeys(self._numbers.values())}
        self._watch.passed = None  # belongs to the forward of these recordings
        return {asked: numbers[layer] for asked, layer in self._numbers.items()}

    def clear(self) -> None:
        """Forgets what was recorded in this thread, such as the forwards of an evaluation or of generation."""
        self._take()
        self._watch.passed = None

    def remove(self) -> None:
        """Stops recording. The model is as it was before, except that replacements of its modules are kept."""
        if self._removed:
            return
        self._removed = True
        for module, sinks in self._lists:
            sinks[:] = [sink for sink in sinks if sink[0] is not self]
            if not sinks:
                _restore(module, "forward" if self._rotary == "before" else _ATTEND, sinks)
        self._activations.remove(self._stack.root)
        self._watch.handle.remove()
        self._take()

    def _containers(self, layer: int, path: str) -> list[nn.Module]:
        """The modules from a layer to its recorded modules, which may be checkpointed."""
        names = path.split(".")
        first = self._stack.layers.count(".") + 2
        return [submodule(self._stack.root, ".".join(names[:end])) for end in range(first, len(names))]

    def _put(self, own: bool, key: _Key, output: Any) -> None:
        call, number = self._calls[key]
        if torch.compiler.is_compiling():  # neither the thread nor the backward is known, and neither matters
            if own:
                self._compiled.put(key, call, number, output)
        elif own and torch._C._current_graph_task_id() == -1:  # not a recomputation, which runs in the backward
            self._eager.put(key, call, number, output)

    def _ends_forward(self, key: _Key) -> bool:
        """True if `until_recorded` awaits no other module than this one."""
        awaited = self._eager.awaited
        if not awaited:
            return False
        if self._eager.calls.get(key, 0) > self._calls[key][0]:
            awaited.discard((id(self), key))
        return not awaited

    def _take(self) -> tuple[dict[_Key, Any], dict[_Key, int]]:
        """The outputs of this thread, which are forgotten, and the numbers of calls."""
        found: dict[_Key, Any] = {}
        calls: dict[_Key, int] = {}
        for outputs in [self._compiled] if torch.compiler.is_compiling() else [self._compiled, self._eager]:
            found.update(outputs.found)
            for key, count in outputs.calls.items():
                calls[key] = calls.get(key, 0) + count
            outputs.clear()
        return found, calls

    def _result(self, layer: int, found: dict[_Key, Any]) -> QKV:
        outputs: Any = [found[key] for key in self._modules if key[0] == layer]
        path, module = self._modules[layer, 0]
        if not torch.compiler.is_compiling():
            for recorded in tree_leaves(outputs):
                self._watch.check(recorded)
        if self._rotary == "after":
            outputs = merge_heads(*outputs[0])
        elif not all(isinstance(x, torch.Tensor) for x in outputs):
            kinds = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in outputs]
            raise RuntimeError(f"layer {layer}: {path} and its neighbours return {kinds}; expected (B, S, hidden) each")
        else:
            outputs = self._divisions[layer](self._stack.root, outputs)
        if any(x.shape[:-1] != outputs[0].shape[:-1] for x in outputs):
            kinds = [tuple(x.shape) for x in outputs]
            raise RuntimeError(f"layer {layer}: {path} and its neighbours return {kinds}; expected (B, S, hidden) each")
        if not torch.compiler.is_compiling() and module.training and not any(x.requires_grad for x in outputs):
            self._check_mode(layer, module)
        return QKV(*outputs)

    def _check_mode(self, layer: int, module: nn.Module) -> None:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters()):
            raise RuntimeError(
                f"layer {layer} was recorded without gradient, although the model is in training mode. For a student, "
                "run the forward with gradients enabled and without reentrant checkpointing around the layer; for a "
                "teacher, call eval()"
            )
        if _uses_dropout(self._stack.root):
            raise RuntimeError(
                f"layer {layer} was recorded without gradient in training mode, with dropout: call eval() on a teacher"
            )

    def __enter__(self) -> "record_qkv":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()
