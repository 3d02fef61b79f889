"""Reads option values of any origin as the declared type, and prints them the way the command line takes them."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

RELATION_NAMES = tuple(a + b for a in "qkv" for b in "qkv")
# Models and optimizer compute in float32. Numbers above the first limit become infinite, and numbers below the second
# one lose precision.
_LARGEST_FLOAT32, _SMALLEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127, 2.0**-126


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def default_of(option: Field[Any]) -> Any:
    """The default of an option, `MISSING` for a required one."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def show(value: Any) -> str:
    """A value in the spelling of the command line; objects that are no option value are printed by `shown`."""
    if value and isinstance(value, tuple) and all(isinstance(item, dict) for item in value):
        return _show_assistants(value)
    if isinstance(value, dict) and all(isinstance(weight, (int, float)) for weight in value.values()):
        return ",".join(f"{name}:{_number(weight)}" for name, weight in value.items())
    if isinstance(value, (tuple, list)) and all(isinstance(item, (str, int, float)) for item in value):
        return ",".join(map(str, value))
    return shown(value) if isinstance(value, (dict, tuple, list)) else str(value)


def _number(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


class _Short(reprlib.Repr):
    """A `repr` of limited length, because values from a settings file may be nested, aliased and large."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"an integer of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """`repr(value)`, shortened to about 80 characters, for use in a message."""
    text = _Short().repr(value)
    return text if len(text) <= 90 else f"{text[:80]}…"


def coerce(option: Field[Any], value: Any, hint: Any) -> Any:
    """Converts `value` to the declared type of `option`.

    Text is parsed for every type, because YAML 1.1 reads `6e-4` as text. The word for an option that is not set, which
    is "none" for most options, is read as well.

    Raises:
        ValueError: the value does not have the type, or is none of the choices. The message names the option.
    """
    absent = default_of(option)
    if isinstance(value, str) and value == option.metadata["absent"] and absent in (None, ()) and not _is_text(hint):
        return absent
    if NoneType in get_args(hint):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    choices = option.metadata["choices"]
    for one in value if get_origin(hint) is tuple and isinstance(value, (tuple, list)) else (value,):
        if choices and one not in choices:
            raise ValueError(f"{flag(option.name)} must be one of {', '.join(choices)}, got {shown(one)}")
    try:
        if get_origin(hint) is dict:
            return _relations(value)
        if get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is dict:
            return _assistants(value)
        if get_origin(hint) is tuple:
            return _sequence(value, get_args(hint), option.metadata["path"])
        return _scalar(value, hint, option.metadata["path"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{flag(option.name)}: {error}") from error


def _is_text(hint: Any) -> bool:
    """True if any text is a value of this type."""
    return hint is str or (get_origin(hint) is not dict and any(map(_is_text, get_args(hint))))


_EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_ACCEPTED: dict[type, tuple[type, ...]] = {float: (int, str), int: (str,)}  # other types that are converted


def _scalar(value: Any, kind: type, path: bool = False) -> Any:
    if isinstance(value, PathLike):
        value = fspath(value)
    refused = ValueError(f"expected {_EXPECTED[kind]}, got {shown(value)}")
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right and (isinstance(value, bool) or not isinstance(value, _ACCEPTED.get(kind, ()))):
        raise refused
    try:
        value = kind(value)
    except (ValueError, OverflowError):
        raise refused from None
    if kind is float:
        return _finite(value)
    return check_text(value, path) if kind is str else value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    if abs(value) > _LARGEST_FLOAT32 or 0 < abs(value) < _SMALLEST_FLOAT32:
        raise ValueError(f"expected a number in the range of float32, got {value}")
    return value


def check_text(value: str, path: bool) -> str:
    """Returns `value`, with `~` expanded if it is a path. Raises `ValueError` if it cannot name anything."""
    if not value.strip():
        raise ValueError(f"expected a name, got {shown(value)}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"expected text that UTF-8 can encode, without NUL, got {shown(value)}")
    if not path or not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError:
        advice = f"for a folder of that name write ./{value[:80]}"
        raise ValueError(f"there is no home folder for {shown(value)}; {advice}") from None


def _sequence(value: Any, kinds: tuple[Any, ...], path: bool) -> tuple[Any, ...]:
    kind, open_ended = kinds[0], kinds[-1] is Ellipsis
    if isinstance(value, str):
        value = [value] if kind is str else value.split(",")
    if not isinstance(value, (list, tuple)):
        value = [value]
    if not open_ended and len(value) != len(kinds):
        raise ValueError(f"expected {len(kinds)} values, got {shown(value)}")
    return tuple(_scalar(item, kind, path) for item in value)


def _relations(value: Any) -> dict[str, float]:
    """Relation weights from a mapping, from a list of names, or from text such as "qq:1,vv:0.5"."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        parts = [item.strip().partition(":") for item in value]
        value = {name: weight if colon else 1.0 for name, colon, weight in parts}
        if len(value) < len(parts):
            raise ValueError("a relation is named twice")
    if not isinstance(value, Mapping):
        raise ValueError(f"expected relations such as qq:1,kk:1,vv:0.5, got {shown(value)}")
    relations = {}
    for name, weight in value.items():
        if name not in RELATION_NAMES:
            raise ValueError(f"expected relations of q, k and v ({', '.join(RELATION_NAMES)}), got {shown(name)}")
        relations[name] = _scalar(weight, float)
        if relations[name] < 0:
            raise ValueError(f"expected a weight of 0 or more for {name}, got {relations[name]}")
    if not any(relations.values()):
        raise ValueError(
            f"expected at least one relation with a weight above 0, got {shown(value) if value else 'none'}"
        )
    return relations


_LAYERS, _HIDDEN = "student_num_hidden_layers", "student_hidden_size"


def _assistants(value: Any) -> tuple[dict[str, Any], ...]:
    """The options of teacher assistants, from sizes such as "12x384", mappings of options, or JSON of both."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith(("[", "{")) else value.split(",")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON, got {shown(value)} ({error})") from error
    assistants = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        size = re.fullmatch(r"\s*([0-9]{1,9})x([0-9]{1,9})\s*", item) if isinstance(item, str) else None
        if size:
            item = {_LAYERS: int(size[1]), _HIDDEN: int(size[2])}
        if not isinstance(item, Mapping):
            raise ValueError(f"expected layers x hidden size, such as 12x384, or options, got {shown(item)}")
        assistants.append(dict(item))
    return tuple(assistants)


def _show_assistants(assistants: tuple[dict[str, Any], ...]) -> str:
    if all(set(assistant) == {_LAYERS, _HIDDEN} for assistant in assistants):
        return ",".join(f"{assistant[_LAYERS]}x{assistant[_HIDDEN]}" for assistant in assistants)
    return json.dumps(assistants)
