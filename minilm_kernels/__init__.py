"""Distillation losses of MiniLM and MiniLMv2 that never materialize an attention-relation matrix.

Importing the package is cheap: torch and transformers are imported at the first use of a name that needs them. The
operators are registered with torch at once if torch is imported already, otherwise with that first use.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import QKV, MiniLMLoss, MiniLMv2Loss
    from .qkv import QKVExtractor
    from .relation import backend_status, relation_kl
    from .students import student_config

__version__ = "0.1.0"

__all__ = [
    "QKV",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "QKVExtractor",
    "backend_status",
    "relation_kl",
    "student_config",
]


_MODULES = {
    "QKV": ".losses",
    "MiniLMLoss": ".losses",
    "MiniLMv2Loss": ".losses",
    "QKVExtractor": ".qkv",
    "backend_status": ".relation",
    "relation_kl": ".relation",
    "student_config": ".students",
}


def __getattr__(name: str) -> Any:
    """The public names, and the submodules `losses` and `relation`, on first use."""
    if name in ("losses", "relation"):
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    import_module(".losses", __name__)
