"""Operands of the products in an attention, and their comparison with recorded queries, keys and values."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__}
_ADDED = {torch.baddbmm, torch.Tensor.baddbmm}  # the first argument is a summand


class Products(TorchFunctionMode):
    """Keeps the operands of the products that a module computes, one list for each call of the module.

    Each entry is (first, second) of a product, or (query, key, value) of a call of scaled_dot_product_attention.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.calls: list[list[tuple[torch.Tensor, ...]]] = []
        self.inside = False
        self.handles = [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]

    def _enter(self, *_: Any) -> None:
        self.inside = True
        self.calls.append([])

    def _leave(self, *_: Any) -> None:
        self.inside = False

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside:
            if function in _PRODUCTS:
                self.calls[-1].append(tuple(args[:2]))
            elif function in _ADDED:
                self.calls[-1].append(_operands(("input", "batch1", "batch2"), args, kwargs)[1:])
            elif function is F.scaled_dot_product_attention:
                self.calls[-1].append(_operands(("query", "key", "value"), args, kwargs))
        return function(*args, **(kwargs or {}))


def _operands(names: Sequence[str], args: Any, kwargs: Any) -> tuple[torch.Tensor, ...]:
    return (*args[: len(names)], *((kwargs or {})[name] for name in names[len(args) :] if name in (kwargs or {})))


def kinds(recorded: Sequence[torch.Tensor], products: Sequence[tuple[torch.Tensor, ...]]) -> list[str]:
    """The relation of recorded query, key and value to the operands of the attention.

    Returns:
        For each of the three: "equal", "scaled" (by one number), "rotated" (norms of all heads are equal), "rotated,
        scaled", or "other".
    """
    first = [p[0] for p in products]
    second = [p[1] if len(p) == 3 else p[1].transpose(-1, -2) for p in products]
    last = [p[2] if len(p) == 3 else p[1] for p in products]
    found = []
    for x, operands in zip(recorded, (first, second, last), strict=True):
        names = [_kind(x, operand) for operand in operands]
        found.append(next((name for name in _KINDS if name in names), "other"))
    return found


_KINDS = ("equal", "scaled", "rotated", "rotated, scaled")


def _kind(x: torch.Tensor, operand: torch.Tensor) -> str:
    """The relation of x, (B, S, heads x width), to an operand, (B, heads, S, width) or (B x heads, S, width)."""
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(1, -2)
    size, length, width = x.shape[0], operand.shape[-2], operand.shape[-1]
    if length != x.shape[1] or x.shape[-1] % width or operand.numel() % (size * length * width):
        return "other"
    heads = x.shape[-1] // width
    operand = operand.reshape(size, -1, length, width)
    if operand.shape[1] % heads:
        return "other"
    operand = operand[:, :: operand.shape[1] // heads]
    x = x.unflatten(-1, (heads, width)).transpose(1, 2)
    if _close(x, operand):
        return "equal"
    before, after = x.norm(dim=-1), operand.norm(dim=-1)
    scale = after.mean() / before.mean()
    if not _close(scale * before, after):
        return "other"
    if _close(scale * x, operand):
        return "scaled"
    return "rotated" if abs(scale - 1) < 1e-4 else "rotated, scaled"


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().mean())
