"""Distillation losses of MiniLM and MiniLMv2 that never materialize an attention-relation matrix."""

from .losses import QKV, MiniLMLoss, MiniLMv2Loss
from .relation import available_backends, relation_kl

__version__ = "0.1.0"

__all__ = ["QKV", "MiniLMLoss", "MiniLMv2Loss", "available_backends", "relation_kl"]
