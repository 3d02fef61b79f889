"""MiniLM and MiniLMv2 distillation losses that never materialize an attention-relation matrix.

Importing the package is cheap: torch and transformers are imported when a name that needs them is first used. The
operators are registered with torch at that time, or at once if torch is already imported.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .losses import QKV, MiniLMLoss, MiniLMv2Loss, SelfRelationLoss
    from .presets import PRESETS, Preset
    from .qkv import QKVExtractor
    from .recording import record_qkv
    from .relation import backend_status, prefix_mask, relation_kl, relation_kl_multi
    from .students import copied_student, pca_student, preset_config, random_student, student_config
    from .vocabulary import TrimmedVocabulary, trim_vocabulary

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "QKV",
    "MiniLMLoss",
    "MiniLMv2Loss",
    "Preset",
    "QKVExtractor",
    "SelfRelationLoss",
    "TrimmedVocabulary",
    "backend_status",
    "copied_student",
    "pca_student",
    "prefix_mask",
    "preset_config",
    "random_student",
    "record_qkv",
    "relation_kl",
    "relation_kl_multi",
    "student_config",
    "trim_vocabulary",
]

_NAMES = {
    ".losses": ("QKV", "MiniLMLoss", "MiniLMv2Loss", "SelfRelationLoss"),
    ".presets": ("PRESETS", "Preset"),
    ".qkv": ("QKVExtractor",),
    ".recording": ("record_qkv",),
    ".relation": ("backend_status", "prefix_mask", "relation_kl", "relation_kl_multi"),
    ".students": ("copied_student", "pca_student", "preset_config", "random_student", "student_config"),
    ".vocabulary": ("TrimmedVocabulary", "trim_vocabulary"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """The public names, and the submodules `integrations`, `losses` and `relation`, imported on first use."""
    if name in ("integrations", "losses", "relation"):
        return import_module(f".{name}", __name__)
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted(__all__)


_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file():
    from ._source_tree import warn_if_it_shadows

    warn_if_it_shadows(_root)

if "torch" in sys.modules:
    import_module(".losses", __name__)
