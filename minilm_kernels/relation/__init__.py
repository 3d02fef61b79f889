"""The operator for which everything else exists: KL between teacher and student relations, without S×S matrices."""

from .api import relation_kl, relation_kl_multi
from .ops import backend_status

__all__ = ["backend_status", "relation_kl", "relation_kl_multi"]
