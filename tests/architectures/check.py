"""Extraction and recording of one model type, compared with values that are computed independently."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from minilm_kernels import QKV, QKVExtractor, record_qkv
from minilm_kernels._architectures import Stack, base_model, find_stacks
from minilm_kernels.students import copied_student

from .products import Products, kinds
from .small_models import batches, folder, small_models


class Wrong(Exception):
    """Values that are not those of the model."""


@dataclass
class Row:
    """Results for one stack of layers of a model type. Columns without a result are empty."""

    model_type: str
    folder: str
    stack: str = ""
    attention: str = ""
    runs: bool = False
    has_attention: bool = False
    before: str = ""
    after: str = ""
    extract: str = ""
    copied: str = ""
    mask: str = ""
    quantity: str = ""
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def served(self) -> bool:
        return bool(self.before or self.after)


def check(model_type: str) -> list[dict[str, Any]]:
    """The rows of a model type."""
    row = Row(model_type, folder(model_type))
    try:
        model, inputs, ran = _running(model_type)
    except Exception as error:
        row.reasons["build"] = _line(error)
        return [asdict(row)]
    row.runs = True
    row.has_attention = any(re.search("attention|attn", type(m).__name__, re.IGNORECASE) for m in ran.values())
    base = base_model(model)
    stacks = [stack for stack in find_stacks(base) if _runs(stack, base, ran)]
    if not stacks:
        row.reasons["record"] = _failure(lambda: record_qkv(model)) or "the layers did not run with the scan's inputs"
        return [asdict(row)]
    stacks.sort(key=lambda stack: not _full_layers(stack))
    return [asdict(_check_stack(Row(**asdict(row)), model, stack, inputs)) for stack in stacks[:2]]


def _running(model_type: str) -> tuple[Any, dict[str, Any], dict[str, nn.Module]]:
    """The first small model and batch that run, and the modules that did.

    Raises:
        Exception: none does; the first failure.
    """
    failure: Exception = ValueError("too large")
    first = True
    models = small_models(model_type)
    while True:
        try:
            model = next(models)
        except StopIteration:
            raise failure from None
        except Exception as error:
            raise (error if first else failure) from None
        for inputs in batches(model):
            try:
                return model, inputs, _ran(model, inputs)
            except Exception as error:
                failure = error if first else failure
                first = False


def _ran(model: nn.Module, inputs: dict[str, Any]) -> dict[str, nn.Module]:
    ran: dict[str, nn.Module] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, _, name=name: ran.update({name: m}))
        for name, module in base_model(model).named_modules()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return ran


def _full_layers(stack: Stack) -> list[int]:
    return [i + 1 for i in range(stack.count) if not _failure(lambda i=i: stack.resolve(i + 1))]


def _runs(stack: Stack, base: nn.Module, ran: dict[str, nn.Module]) -> bool:
    return any(stack.at(stack.attention, i + 1) in ran for i in range(stack.count))


def _check_stack(row: Row, model: Any, stack: Stack, inputs: dict[str, Any]) -> Row:
    row.stack = stack.layers
    one = len(stack.templates) == 1
    named: Any = {stack.templates[0]: stack.order} if one else list(stack.templates)
    options = {"projections": named}
    layers = _full_layers(stack)
    if not layers:
        row.reasons["record"] = _failure(lambda: stack.resolve(stack.count)) or ""
        return row
    layer = layers[-1]
    row.attention = type(base_model(model).get_submodule(stack.at(stack.attention, layer))).__name__
    recorded: dict[str, QKV] = {}
    measured: list[str] = []
    rotary: Literal["before", "after"]
    for rotary in ("before", "after"):
        try:
            recorded[rotary], found, row_quantity = _record(model, stack, layer, rotary, options, inputs)
            row.quantity = row.quantity or row_quantity
            setattr(row, rotary, _verdict(rotary, row_quantity, found, stack, row))
            if rotary == "before":
                measured = found
            elif row.before and recorded[rotary].query.shape[-2] > 1 and row.attention not in _SKEWED:
                # the first position is not rotated
                _check_quantity(measured, row_quantity)
        except Wrong as error:
            row.reasons[rotary] = f"WRONG: {_line(error)}"
        except Exception as error:
            row.reasons[rotary] = _line(error)
    if not row.served:
        return row
    rotary = "before" if row.before else "after"
    try:
        given = {name: value for name, value in inputs.items() if name != "use_cache"}
        example = None if set(given) <= {"input_ids", "attention_mask"} else given
        extractor = QKVExtractor(model, layer, rotary=rotary, example=example, **options)
        torch.manual_seed(0)
        with torch.no_grad():
            found = extractor(**given)
        pairs = list(zip(found, recorded[rotary], strict=True))
        if not all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in pairs):
            raise Wrong("extractor and recorder differ")
        row.extract = "yes" if all(torch.equal(a, b) for a, b in pairs) else "rounded"
    except Wrong as error:
        row.reasons["extract"] = f"WRONG: {error}"
    except Exception as error:
        row.reasons["extract"] = _line(error)
    if "input_ids" in inputs:
        _failure(lambda: _set_mask(row, model, inputs))
        if reason := _failure(lambda: _copy(model, stack, inputs, options)):
            row.reasons["copied"] = reason
        else:
            row.copied = "yes"
    return row


def _record(
    model: Any, stack: Stack, layer: int, rotary: Any, options: Any, inputs: dict[str, Any]
) -> tuple[QKV, list[str], str]:
    """The recording of one forward, and its relation to the operands of the products in the attention."""
    attention = base_model(model).get_submodule(stack.at(stack.attention, layer))
    call, _ = stack.calls(stack.attention, layer)
    values: dict[str, list[tuple[torch.Tensor, nn.Module]]] = {}

    def keep(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            if arguments:
                values.setdefault(path, []).append((arguments[0].clone(), module))

        return hook

    handles = [
        base_model(model).get_submodule(path).register_forward_pre_hook(keep(path))
        for path in dict.fromkeys(stack.paths(layer))
    ]
    with record_qkv(model, [layer], rotary, **options) as recorder, torch.no_grad(), Products(attention) as products:
        torch.manual_seed(0)  # some models draw random numbers in evaluation, too
        model(**inputs)
        recorded = recorder.pop()[layer]
        quantity = recorder.quantity[layer]
    for handle in handles:
        handle.remove()
    for name in ("input_ids", "decoder_input_ids"):
        swapped = inputs[name].T.shape if name in inputs else None
        if swapped == recorded.query.shape[:-1] and swapped[0] != swapped[1]:
            raise Wrong("(S, B, hidden)")
    if rotary == "before" and not stack.order:
        for x, path in zip(recorded, stack.paths(layer), strict=True):
            taken = values[path][call] if len(values.get(path, ())) > call else None
            expected = None if taken is None else _product(*taken)
            if expected is not None and expected.shape == x.shape and not torch.allclose(x, expected, 1e-4, 1e-5):
                raise Wrong(f"{path}: not the product of its input and its weight")
    return recorded, kinds(recorded, products.calls[call]), quantity


def _product(x: torch.Tensor, module: Any) -> torch.Tensor | None:
    """The output of a plain linear projection, computed in float64 from its input and weight; None for others."""
    if type(module) is not nn.Linear:
        return None
    y = x.double() @ module.weight.double().T
    return (y if module.bias is None else y + module.bias.double()).float()


def _verdict(rotary: str, quantity: str, found: list[str], stack: Stack, row: Row) -> str:
    """Judges the relation of recorded query, key and value to the operands; the text for the page."""
    operands = found != ["other"] * 3
    if rotary == "after":
        if found != ["equal"] * 3:
            raise Wrong(f"the operands of the attention are {found}")
        row.quantity = f"{row.quantity}; {quantity}" if row.quantity else quantity
        return "yes"
    if stack.order and found[2] != "equal":
        row.reasons["proof"] = f"of the order {stack.order!r}: parts are {found}"
        return "unproved"
    if not operands:
        return "recomputed"
    return "yes"


# V-JEPA 2 multiplies pairs of neighbours by angles that it has laid out for halves, so that norms change.
_SKEWED = {"VJEPA2RopeAttention"}
_VALUES = {"equal": set[str](), "scaled": {"value-scaled"}}


def _check_quantity(measured: list[str], quantity: str) -> None:
    """Compares the operands' relation to the projections' outputs with the quantity that the recorder names."""
    words = set(quantity.split(", ")) - {"projection"}
    query, key, value = measured
    expected = ({"normed"} if "other" in (query, key) else set()) | _VALUES.get(value, {"value-normed"})
    if query == key == "rotated, scaled":  # scaled rotary embeddings, as in YaRN
        query = key = "rotated"
    expected |= {word for kind in (query, key) for word in kind.split(", ") if word in ("rotated", "scaled")}
    if "normed" in expected:  # hides a rotation and a scale
        words -= {"rotated", "scaled"}
        expected -= {"rotated", "scaled"}
    if words != expected:
        raise Wrong(f"the quantity is {quantity!r}, measured is {sorted(expected)} ({measured})")


def _set_mask(row: Row, model: Any, inputs: dict[str, Any]) -> None:
    """Finds out whether the first token sees the last one, by changing it."""
    of_decoder = row.stack.startswith("decoder") and "decoder_input_ids" in inputs
    name = "decoder_input_ids" if of_decoder else "input_ids"
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = base_model(model).get_submodule(row.stack).get_submodule("0").register_forward_hook(keep)
    with torch.no_grad():
        for difference in (0, 1):
            ids = inputs[name].clone()
            ids[:, -1] -= difference
            model(**(inputs | {name: ids}))
    handle.remove()
    if not torch.equal(outputs[0], outputs[-1]):  # otherwise the stack does not see the tokens
        row.mask = "causal" if torch.equal(outputs[0][:, 0], outputs[-1][:, 0]) else "full"


def _copy(model: Any, stack: Stack, inputs: dict[str, Any], options: Any) -> None:
    student = copied_student(model, list(range(1, stack.count + 1)), **options).eval()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model.base_model(**inputs)[0]
        torch.manual_seed(0)
        found = student.base_model(**inputs)[0]
    if not torch.allclose(expected, found, 1e-4, 1e-5):
        raise Wrong("a student with all layers computes something else than its teacher")


def _failure(function: Callable[[], Any]) -> str | None:
    try:
        result = function()
    except Exception as error:
        return ("WRONG: " if isinstance(error, Wrong) else "") + _line(error)
    if isinstance(result, record_qkv):
        result.remove()
    return None


def _line(error: Exception | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
