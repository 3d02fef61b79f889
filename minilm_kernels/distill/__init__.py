"""The distillation loop as a library: `distill(DistillConfig(...))`, and the command line `minilm-distill`."""

from typing import TYPE_CHECKING, Any

from .config import DistillConfig

if TYPE_CHECKING:
    from .loop import DistillResult, distill

__all__ = ["DistillConfig", "DistillResult", "distill"]


def __getattr__(name: str) -> Any:
    """The loop needs transformers, which takes seconds to import: `--help` and wrong options do not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loop

    return getattr(loop, name)
