"""Static cost of the GPU kernels: compiles them without a GPU, reads their machine code, counts per ordered pair."""

from .cli import main, register

__all__ = ["main", "register"]
