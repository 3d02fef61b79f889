"""Distillation of a whole model: `distill(DistillConfig(...))`, or `minilm-distill` on the command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minilm_kernels._extras import optional_imports

from .config import DistillConfig

if TYPE_CHECKING:
    from .loop import DistillResult, distill
    from .preparation import prepare

__all__ = ["DistillConfig", "DistillResult", "distill", "prepare"]


def __getattr__(name: str) -> Any:
    """Imports the loop on first use, because it imports torch and transformers, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with optional_imports("distill", "minilm_kernels.distill"):
        module = import_module(".preparation" if name == "prepare" else ".loop", __name__)
    return getattr(module, name)
