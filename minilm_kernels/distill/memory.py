"""Out-of-memory errors, and the random state from which a step is repeated after one."""

from __future__ import annotations

import torch
from torch import Tensor

# Allocators and libraries raise plain RuntimeErrors, too.
_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a smaller batch may avoid the error."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators of the CPU and of `device`."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def restore_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restores the states that `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
