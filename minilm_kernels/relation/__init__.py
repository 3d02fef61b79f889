"""KL divergence between attention relations of a teacher and a student, without S×S matrices in memory."""

from .api import relation_kl, relation_kl_multi
from .dispatch import backend_status

__all__ = ["backend_status", "relation_kl", "relation_kl_multi"]
