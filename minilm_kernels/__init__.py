"""Distillation losses of MiniLM and MiniLMv2 that never materialize an attention-relation matrix."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .losses import QKV, MiniLMLoss, MiniLMv2Loss
from .relation import available_backends, relation_kl

if TYPE_CHECKING:
    from .qkv import QKVExtractor
    from .students import student_config

__version__ = "0.1.0"

__all__ = [
    "QKV",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "QKVExtractor",
    "available_backends",
    "relation_kl",
    "student_config",
]


_MODULES = {"QKVExtractor": ".qkv", "student_config": ".students"}


def __getattr__(name: str) -> Any:
    """The names that need transformers are imported on first use: the losses alone start without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return globals()[name]
