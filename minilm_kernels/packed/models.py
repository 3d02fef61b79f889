"""`use_packed_attention`: models of transformers attend within the documents of one row.

The borders come as keyword arguments of the model's forward, in transformers' own words. Keywords survive gradient
checkpointing, DistributedDataParallel and torch.compile; a context would be gone when layers run again in the backward.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from minilm_kernels._wrappers import is_pretrained_model, unwrap

from .attention import packed_attention

__all__ = ["use_packed_attention"]

NAME = "minilm_kernels_packed"  # attention function and mask function
BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
KEYWORDS = frozenset((*BORDERS, "prefix_lens", "is_causal"))
# Float32 rounding gives less than 1e-6; in small random encoders, one of six tokens changes the others by 2e-3.
_TOLERANCE = 1e-4

_calls: list[nn.Module] | None = None  # modules that have attended, in any thread, while a model is tried out
_trying = threading.Lock()


def takes_borders(model: Any) -> bool:
    """True if a model attends within the documents of a packed row."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def borders(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """The keyword arguments of a model's forward for these documents: (N + 1,) int32, and a bound of their lengths."""
    return dict(zip(BORDERS, (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), strict=True))


def use_packed_attention(model: nn.Module) -> None:
    """Makes a model attend within the documents of one row, without a mask.

    The model then takes a row of all documents, (1, T), and their borders by the names that transformers uses for
    flash-attention: `cu_seq_lens_q` and `cu_seq_lens_k`, (N + 1,) int32, and `max_length_q` and `max_length_k`, the
    tokens of the longest document. transformers' `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` returns
    such batches, with `position_ids` that begin again in every document. Give no `attention_mask`; decoders need
    `use_cache=False`. The keyword `is_causal` replaces the model's own mask, and `prefix_lens`, (N,), lets tokens of a
    prefix see each other (see `packed_attention`). A forward without borders raises a ValueError.

    The function tries the model out: each layer must attend by this function once, and a document must not change
    another one. Call it before `record_qkv`, `DistributedDataParallel` and `torch.compile`, with the model in the mode
    in which it will run.

    Args:
        model: a model of transformers, alone or inside PEFT or sentence-transformers.

    Raises:
        ValueError: the model is not one of transformers; it is an encoder-decoder; its attention does not go through
            transformers' attention interface (MPNet, DeBERTa-v2), or has other terms than products of queries and keys
            (T5, Gemma 2); documents change one another. The model keeps its attention.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from minilm_kernels.packed import use_packed_attention
        >>> sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
        >>> model = BertModel(BertConfig(vocab_size=100, **sizes))
        >>> use_packed_attention(model)
        >>> borders = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> ids, positions = torch.tensor([[4, 5, 6, 7, 8]]), torch.tensor([[0, 1, 2, 0, 1]])
        >>> lengths = dict(cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=3, max_length_k=3)
        >>> model(input_ids=ids, position_ids=positions, **lengths).last_hidden_state.shape
        torch.Size([1, 5, 24])
    """
    inner: Any = unwrap(model, runs_whole=True)
    name = type(inner).__name__
    if not is_pretrained_model(inner):
        raise ValueError(f"model: expected a model of transformers, got {name}")
    if inner.config.is_encoder_decoder:
        raise ValueError(f"model: {name} is an encoder-decoder, whose cross-attention has no packed form")
    if not inner._can_set_attn_implementation():
        raise ValueError(f"model: the attention of {name} does not go through transformers' attention interface")
    register()
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        _try_out(inner)
    except Exception as error:
        inner.set_attn_implementation(before)
        raise ValueError(f"model: {name} has no packed attention: {error}") from error


def register() -> None:
    """Makes the attention function and the mask function known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    prefix_lens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (1, heads, T, width) to (1, T, heads, width)."""
    name = type(module).__name__
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            f"{name}: cu_seq_lens_q and max_length_q did not arrive, without which documents would be mixed; give "
            f"{', '.join(BORDERS)} to the model's forward"
        )
    if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
        raise ValueError(f"{name}: cu_seq_lens_q and cu_seq_lens_k must be equal: queries and keys are the same tokens")
    given = [term for term in ("position_bias", "softcap", "s_aux", "head_mask") if others.get(term) is not None]
    if attention_mask is not None or given:
        raise ValueError(f"{name}: packed attention takes no {' or '.join(given) or 'attention_mask'}")
    if query.shape[0] != 1:
        raise ValueError(f"{name}: packed attention takes one row, (1, T), got {query.shape[0]} rows")
    if (calls := _calls) is not None:
        calls.append(module)
    # Under autocast, norms and rotations leave queries and keys in float32.
    query, key, value = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    output = packed_attention(
        query,
        key,
        value,
        cu_seq_lens_q,
        max_length_q,
        scale=scaling,
        causal=getattr(module, "is_causal", False) if is_causal is None else is_causal,
        window=None if sliding_window is None else sliding_window - 1,  # it counts the token itself
        prefix_lens=prefix_lens,
        dropout=dropout,
    )
    return output[None], None


def _no_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """The mask function: documents have borders, and no mask."""
    if attention_mask is not None:
        raise ValueError("packed attention takes no attention_mask; leave out padding, or make it a document")


def _try_out(model: Any) -> None:
    """Runs two documents, and others in the place of either, on a model that has the attention function."""
    global _calls
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    ids = [i for i in range(1, 8) if i != config.pad_token_id]
    first, second = ids[:3], ids[3:5]
    rows = ([*first, *second], [*second, ids[3], *second], [*first, ids[0], ids[0]])
    keywords = borders(torch.tensor([0, 3, 5], dtype=torch.int32, device=device), 3)
    modes = {module: module.training for module in model.modules()}
    outputs: list[Tensor] = []
    try:
        with _trying, torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if model.training:  # attention dropout
                _run(model, rows[0], keywords)
            model.eval()
            for row in rows:
                calls: list[nn.Module] = []
                _calls = calls
                try:
                    outputs.append(_run(model, row, keywords))
                finally:
                    _calls = None
                count = sum(module in modes for module in calls)
                if count != config.num_hidden_layers:
                    raise ValueError(f"{count} of its {config.num_hidden_layers} layers attend by this function")
    finally:
        for module, mode in modes.items():
            module.training = mode
    limit = _TOLERANCE * outputs[0].abs().max()
    if (outputs[0] - outputs[1])[3:].abs().max() > limit or (outputs[0] - outputs[2])[:3].abs().max() > limit:
        raise ValueError("a document changes another one")


def _run(model: Any, ids: list[int], keywords: dict[str, Any]) -> Tensor:
    """The last hidden states of a row, (T, hidden) float32."""
    device = keywords["cu_seq_lens_q"].device
    output = model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False, **keywords)
    return output.last_hidden_state[0].float()
