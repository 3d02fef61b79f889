"""Out-of-memory errors."""

from __future__ import annotations

import torch

# Allocators and libraries raise plain RuntimeErrors, too.
_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if a smaller batch may avoid the error."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _MESSAGES)
