"""Attention within the documents of a packed row, without an S x S mask, for PyTorch tensors and for models."""

from .attention import packed_attention
from .models import use_packed_attention

__all__ = ["packed_attention", "use_packed_attention"]
