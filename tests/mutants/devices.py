"""Mutants of the GPU kernels: Triton's run in its interpreter, CUDA's are compiled for the host and emulated."""

from . import Mutant

MUTANTS: list[Mutant] = []
