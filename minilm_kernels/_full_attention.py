"""Rejects layers with partial attention: windows, chunks, sparse and linear attention.

The relations are softmax distributions over all tokens. A layer with partial attention computes other distributions.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

# Classes of models, layers or attention modules that never compute the full softmax.
_CLASSES = re.compile(
    "Longformer|LEDEncoder|BlockSparse|Local(Self)?Attention|TransientGlobal|GlobalLocal|ProbSparse|LSH|Reformer"
    "|Nystromformer|Yoso|^Mra|Funnel|FNet|Fourier|Doge|Delta(Net|Attention)|(?<!Kimi)Linear(Self)?Attention|Performer"
    "|Linformer|Autoformer|Swin|xLSTM|Mamba|Rwkv|RetNet"
)
# Words in the values of `attention_type`, `layer_type` and similar settings.
_KINDS = re.compile("local|sliding|window|chunk|sparse|linear|prob|lsh|indexed|compress|recurrent|mamba|conv|hybrid")
# Names of settings that limit attention to a window, then similar names of settings that do not.
_WINDOWS = re.compile("window|local_attention|local_radius|attention_chunk")
_NO_WINDOWS = re.compile("^use_|max_window_layers|pattern|kernel|conv|dropout|prob|ind(ex|ices)|_ids?$|positional")
_OF_ENCODERS = {"attention_window", "local_radius"}  # LED and LongT5, whose decoders have full attention
_FULL = {"full_attention", "attention", "global", "basic", "bottleneck"}  # the last two: convolutions of RT-DETR
_IGNORES_LAYER_TYPES = {"minimax"}  # its sliding_window applies to the layers that layer_types calls full
_FULL_LAYERS = ("fullatt_block_indexes", "global_attn_indexes")  # layers of vision models that have no window
_POSITION_WINDOWS = {"vits"}  # its window_size is the range of relative positions


def nearest_config(root: nn.Module, path: str) -> Any:
    """The config of the innermost module on the path that has a config. A model with several towers has several."""
    configs = [module.config for module in _modules_on(root, path) if hasattr(module, "config")]
    return configs[-1] if configs else None


def check_full_attention(root: nn.Module, paths: Sequence[str], layer: int) -> None:
    """Checks that the attention of a layer is full.

    Args:
        root: the base model.
        paths: the attention module of every layer, as paths in `root`.
        layer: the layer, from 1.

    Raises:
        ValueError: the attention is partial. The message lists the layers with full attention.
    """
    exists = [len(_modules_on(root, path)) == path.count(".") + 2 for path in paths]
    partial = [_partial_attention(root, path, i, len(paths)) for i, path in enumerate(paths)]
    reason = partial[layer - 1] or (None if exists[layer - 1] or not any(exists) else "no self-attention")
    if reason is not None:
        full = ", ".join(str(i + 1) for i in range(len(paths)) if exists[i] and partial[i] is None)
        raise ValueError(
            f"layer={layer} has {reason}, so its attention is not a relation over all tokens; "
            f"layers with full attention: {full or 'none'}"
        )


def _modules_on(root: nn.Module, path: str) -> list[nn.Module]:
    """The root and those modules on the path that exist. Layers of hybrid models differ, so some may be missing."""
    modules = [root]
    for name in path.split("."):
        module = getattr(modules[-1], name, None)
        if not isinstance(module, nn.Module):
            break
        modules.append(module)
    return modules


def _partial_attention(root: nn.Module, path: str, index: int, count: int) -> str | None:
    """Describes the partial attention at the path; None for full attention."""
    modules = _modules_on(root, path)
    config = nearest_config(root, path)
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if types:
        kinds = {types[index]} if len(types) == count else set(types)
        if narrow := sorted(kinds - _FULL):
            return ", ".join(narrow)
    for module in modules:
        name = type(module).__name__
        if _CLASSES.search(name):
            return f"local or approximate attention ({name})"
        for flag in ("local", "is_local", "is_local_attention", "is_sliding"):
            if vars(module).get(flag) is True:
                return f"local attention ({name}.{flag})"
        for attribute in ("attention_type", "attn_type", "layer_type"):
            kind = vars(module).get(attribute)
            if isinstance(kind, str) and _KINDS.search(kind):
                return f"{kind} ({name}.{attribute})"
    if types and getattr(config, "model_type", None) not in _IGNORES_LAYER_TYPES:
        return None
    full_layers = [layer for name in _FULL_LAYERS for layer in getattr(config, name, None) or ()]
    if getattr(config, "model_type", None) in _POSITION_WINDOWS or index in full_layers:
        return None
    for source in (config, *modules):
        for name, value in getattr(source, "__dict__", {}).items():
            unused = "sliding" in name and not getattr(config, "use_sliding_window", True)
            if _is_window(name, value) and not unused and not (name in _OF_ENCODERS and "decoder" in path.split(".")):
                return f"{'sliding_attention' if 'sliding' in name else 'local attention'} ({name}={value})"
    return None


def _is_window(name: str, value: Any) -> bool:
    if not _WINDOWS.search(name) or _NO_WINDOWS.search(name):
        return False
    sizes = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    sizes = [size[0] if isinstance(size, (list, tuple)) and size else size for size in sizes]  # [left, right]
    return bool(sizes) and all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
