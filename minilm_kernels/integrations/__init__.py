"""The relation loss in other packages' trainers, and `RelationTerm` for any training loop.

A name is imported on first use, because the trainers import transformers, sentence-transformers or TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minilm_kernels._extras import optional_imports

if TYPE_CHECKING:
    from .relation_term import RelationTerm
    from .sentence_transformers import (
        RelationDistillLoss,
        RelationKLEvaluator,
        RelationSentenceTransformerTrainer,
    )
    from .transformers import RelationTrainer, RelationTrainingArguments
    from .trl import RelationDistillationTrainer

__all__ = [
    "RelationDistillLoss",
    "RelationDistillationTrainer",
    "RelationKLEvaluator",
    "RelationSentenceTransformerTrainer",
    "RelationTerm",
    "RelationTrainer",
    "RelationTrainingArguments",
]

# Name -> its module here, and the extra that it needs.
_NAMES: dict[str, tuple[str, str | None]] = {
    "RelationDistillLoss": ("sentence_transformers", "sentence-transformers"),
    "RelationDistillationTrainer": ("trl", "trl"),
    "RelationKLEvaluator": ("sentence_transformers", "sentence-transformers"),
    "RelationSentenceTransformerTrainer": ("sentence_transformers", "sentence-transformers"),
    "RelationTerm": ("relation_term", None),
    "RelationTrainer": ("transformers", "trainer"),
    "RelationTrainingArguments": ("transformers", "trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _NAMES[name]
    if extra is None:
        found = import_module(f".{module}", __name__)
    else:
        with optional_imports(extra, f"{__name__}.{name}"):
            found = import_module(f".{module}", __name__)
    globals()[name] = getattr(found, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)
