"""Reads plans and reports, which are TOML files."""

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # no further dependency: pytest requires tomli on Python 3.10
    import tomli as tomllib


def load(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))
