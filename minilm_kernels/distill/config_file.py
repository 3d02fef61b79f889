"""Settings files: YAML or JSON with option names as keys."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os import fspath
from pathlib import Path
from typing import Any

from minilm_kernels._extras import optional_imports

from .config import options_by_name
from .config_values import check_text, shown

with optional_imports("distill", "--config"):
    import yaml

LARGEST_FILE = 2**18  # bytes


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads options from a YAML or JSON file (JSON is YAML). The keys are the names of `DistillConfig`'s fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is neither YAML nor JSON, or has a key twice. The message names the file.
    """
    try:
        file = Path(check_text(fspath(path), path=True))
    except ValueError as error:
        raise ValueError(f"--config: {error}") from None
    try:
        if not file.exists():
            raise FileNotFoundError(f"--config: there is no file {file}")
        if not file.is_file():
            raise FileNotFoundError(f"--config: there is no file {file}: that is a folder or a device")
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {shown(str(file))}: cannot be read: {error}") from error
    if len(content) > LARGEST_FILE:
        raise ValueError(f"--config {file}: expected at most {LARGEST_FILE} bytes of options, the file is larger")
    try:
        text = content.decode("utf-8-sig")
        is_json = file.suffix == ".json"
        values = json.loads(text, object_pairs_hook=_unique_names) if is_json else yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"--config {file}: neither YAML nor JSON of options: nested too deeply") from None
    except Exception as error:  # PyYAML has no common base class for values that do not match their tag
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--config {file}: neither YAML nor JSON: {reason[:400]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {file}: expected option names with values, got {type(values).__name__}")
    return options_by_name(values, f"--config {file}")


class _Loader(yaml.SafeLoader):
    """Loads safe YAML. Refuses duplicate keys, and merge keys, which can grow exponentially by nested aliases."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        found = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                problem = "merge keys (<<) are not supported"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if key.value in found:
                    problem = f"{shown(key.value)} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                found.add(key.value)


def _unique_names(members: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a JSON object. Raises `ValueError` if a name occurs twice."""
    values: dict[str, Any] = {}
    for name, value in members:
        if name in values:
            raise ValueError(f"{shown(name)} is given twice")
        values[name] = value
    return values
