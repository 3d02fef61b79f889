"""Copies of modules that share parameters, buffers and hooks with the originals, to run a part of a model."""

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from minilm_kernels._wrappers import compiled_original

_FORWARDS = ("forward", "_old_forward", "_original_forward")  # the last two are accelerate's


def shell(module: nn.Module) -> nn.Module:
    """A copy with its own attributes and children. Parameters, buffers and hooks remain shared.

    Methods bound to the module are bound to the copy. If the instance has a replaced `forward` that refers to the
    module in another way, such as a closure, the copy runs the forward of its class (see `has_own_forward`).
    """
    twin = object.__new__(type(module))  # copy.copy would call methods that wrapper classes define
    attributes = {name: _rebound(value, module, twin) for name, value in vars(module).items()}
    for name in _FORWARDS:
        if name in attributes and (attributes[name] is vars(module)[name] or _holds(attributes[name], module)):
            attributes[name] = types.MethodType(type(module).forward, twin)
    attributes.pop("_compiled_call_impl", None)
    attributes.setdefault("_original", module)
    attributes["_modules"] = dict(module._modules)
    twin.__dict__.update(attributes)
    return twin


def has_own_forward(module: nn.Module) -> bool:
    """True if the instance has a replaced `forward`."""
    return "forward" in vars(module) and compiled_original(module) is module


def switches(module: nn.Module, names: Iterable[str]) -> list[tuple[Any, str]]:
    """A list of (copy, name): every copy in a module that `shell` created, with each of `names` that it has."""
    copies = [inner for inner in module.modules() if "_original" in vars(inner)]
    return [(twin, name) for twin in copies for name in names if name in vars(twin)]


def follow(switches: Iterable[tuple[Any, str]]) -> None:
    """Sets attributes of copies to the current values of the originals."""
    for twin, name in switches:
        value = getattr(twin._original, name)
        if getattr(twin, name) != value:
            setattr(twin, name, value)


def graft(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A copy with the modules at the given paths replaced. Modules that are not on a path are shared."""
    if "" in replaced:
        return replaced[""]
    module = compiled_original(module)
    twin = shell(module)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, new in replaced.items():
        name, _, rest = path.partition(".")
        below.setdefault(name, {})[rest] = new
    for name, inner in below.items():
        twin._modules[name] = graft(module.get_submodule(name), inner)
    return twin


def cut(root: nn.Module, layers: str, layer: int, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """`graft` without the layers after `layer`.

    The last remaining layer raises the exception that ends the forward, so gradient checkpointing is turned off in it.
    """
    view = graft(root, replaced)
    kept = view.get_submodule(layers)._modules
    for name in list(kept)[layer:]:
        del kept[name]
    last = view.get_submodule(layers).get_submodule(str(layer - 1))
    last.__dict__["gradient_checkpointing"] = False
    return view


def unrolled(root: nn.Module, layers: str, order: Sequence[int], setting: str) -> nn.Module:
    """A copy whose list of layers has an entry for each run of a layer, such as ALBERT's, which share their modules.

    Args:
        layers: the list of layers, as a path in `root`.
        order: the index of the module of each layer.
        setting: the number of different layers in the config of the module that has the list.
    """
    parent, _, name = layers.rpartition(".")
    owner, modules = shell(root.get_submodule(parent)), shell(root.get_submodule(layers))
    same = list(modules._modules.values())
    modules.__dict__["_modules"] = {str(i): same[index] for i, index in enumerate(order)}
    owner._modules[name] = modules
    owner.__dict__["config"] = copy.deepcopy(owner.config)
    setattr(owner.config, setting, len(order))
    return graft(root, {parent: owner})


def register_only(module: nn.Module, reached: set[int]) -> nn.Module:
    """The module if all its parameters are reached; otherwise a copy in which the others are plain attributes.

    The others remain attributes because their module may still run, like MPNet's position bias before the first layer.
    """
    if all(id(p) in reached for p in module.parameters()):
        return module
    module = compiled_original(module)
    twin = shell(module)
    others = {name: p for name, p in module._parameters.items() if p is not None and id(p) not in reached}
    if others:
        twin.__dict__["_parameters"] = {name: p for name, p in module._parameters.items() if name not in others}
        twin.__dict__.update(others)
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = register_only(child, reached)
    return twin


def pinned(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of the module and its submodules in evaluation mode, independent of the mode of the originals."""
    module = compiled_original(module)
    if id(module) not in made:
        twin = made[id(module)] = shell(module)
        twin.__dict__["training"] = False
        for name, child in module._modules.items():
            if child is not None:
                twin._modules[name] = pinned(child, made)
    return made[id(module)]


def private(module: nn.Module, aliases: dict[int, nn.Parameter]) -> nn.Module:
    """A copy for the dry run: evaluation mode, no hooks, own buffers, and trainable aliases of the parameters.

    Hooks that compute a weight from parameters (pruning, weight norm) are kept. A module has such a hook if one of its
    attributes is a plain tensor: the computed weight.
    """
    module = compiled_original(module)
    twin = shell(module)
    for parameter in module._parameters.values():
        if parameter is not None and id(parameter) not in aliases:
            data = _usable(parameter.detach())
            aliases[id(parameter)] = nn.Parameter(data, requires_grad=data.is_floating_point())
    tensors = {name: _usable(value) for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    twin.__dict__.update(
        tensors,
        training=False,
        _forward_hooks={},
        _forward_pre_hooks=module._forward_pre_hooks if tensors else {},
        _buffers={name: None if b is None else b.clone() for name, b in module._buffers.items()},
        _parameters={name: None if p is None else aliases[id(p)] for name, p in module._parameters.items()},
    )
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = private(child, aliases)
    return twin


def leaves(outputs: Iterable[torch.Tensor]) -> set[int]:
    """The ids of the leaf tensors in the autograd graph of the outputs."""
    nodes = [output.grad_fn for output in outputs]
    seen, found = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def with_attention(attention: nn.Module, implementation: str) -> nn.Module:
    """A copy of an attention module whose config (a copy, too) selects another attention implementation."""
    twin = shell(attention)
    twin.__dict__["config"] = config_with_attention(attention.config, implementation)
    return twin


def config_with_attention(config: Any, implementation: str) -> Any:
    """A copy of a config that selects another attention implementation."""
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    return config


def _usable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of an inference tensor, which autograd does not accept."""
    return tensor.clone() if tensor.is_inference() else tensor


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and any(x is module for x in value.args):
        return functools.partial(value.func, *(twin if x is module else x for x in value.args), **value.keywords)
    return value


def _holds(function: Callable, module: nn.Module) -> bool:
    """True if a function refers to the module, directly or by a bound method, through an argument or a closure."""
    pending: list[Any] = [function]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if value is module:
            return True
        if id(value) in seen or isinstance(value, nn.Module | type):
            continue
        seen.add(id(value))
        if isinstance(value, types.MethodType):
            pending += [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.FunctionType):
            pending += vars(value).values()
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    pending.append(cell.cell_contents)
        elif callable(value):
            pending += getattr(value, "__dict__", {}).values()
    return False
