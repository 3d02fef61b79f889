"""KL divergence between attention relations of a teacher and a student, without S×S matrices in memory."""

from .api import prefix_mask, relation_kl, relation_kl_multi
from .dispatch import backend_status

__all__ = ["backend_status", "prefix_mask", "relation_kl", "relation_kl_multi"]
