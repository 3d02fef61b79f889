"""The operator for which everything else exists: KL between teacher and student relations, without S×S matrices."""

from .api import relation_kl, relations_kl
from .operator import available_backends

__all__ = ["available_backends", "relation_kl", "relations_kl"]
