"""Static cost of the GPU kernels: instructions per ordered pair, counted in machine code, without a GPU."""

from .cli import main, register

__all__ = ["main", "register"]
