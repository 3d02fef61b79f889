"""Checks before the first step: the weights, the tokenizer against the text, and saving of the student."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModel, AutoTokenizer

from minilm_kernels.qkv import QKV, QKVExtractor
from minilm_kernels.students import one_line

from .batch import Batch
from .checkpoint import TEMPORARY, write_error
from .packing import PADDING, Packer, Samples
from .tokenization import DocumentTokenizer, check_tokenizer

# Embeddings have some unused rows, as padding to a round number or in reserve. More unused rows mean that the tokenizer
# belongs to another model.
MOST_ROWS_A_TOKEN, MOST_PADDING = 2, 128
# Float32 rounding in another order of the keys gives 1e-6; a mask that is ignored gives more than 1e-2.
PACKING_TOLERANCE = 1e-3


def check_weights(extractor: QKVExtractor, info: Mapping[str, Any], option: str, *, teacher: bool) -> None:
    """Checks the weights on which Q, K and V depend.

    Args:
        extractor: the extractor of a loaded model. Weights after its Q, K and V may be missing.
        info: the loading info of transformers with `missing_keys` and `unexpected_keys`.
        option: the option and its value, for messages.
        teacher: True to refuse projections that are all zero, such as placeholders of sharded training.

    Raises:
        ValueError: the checkpoint lacks a tensor, or a tensor is not finite.
    """
    tensors = _reached(extractor)
    missing, unexpected = set(info["missing_keys"]), sorted(info["unexpected_keys"])
    absent = [name for name in tensors if name in missing]
    if absent:
        prefix = _prefix(missing, unexpected)
        if prefix:
            hint = f'; its names begin with "{prefix}": save the model without its wrapper, or rename them'
        else:
            hint = f"; it has {_some(unexpected)} instead" if unexpected else ""
        raise ValueError(
            f"{option}: its weights lack {len(absent)} tensors that Q, K and V of layer {extractor.layer} depend on: "
            f"{_some(absent)}{hint}"
        )
    broken = [name for name, tensor in tensors.items() if not all(map(math.isfinite, _range(tensor)))]
    if broken:
        raise ValueError(f"{option}: its weights are not finite: {_some(broken)} contain NaN or infinity")
    if not all(all(map(math.isfinite, _range(output))) for output in _run(extractor)):
        raise ValueError(f"{option}: its weights are finite, but Q, K and V of layer {extractor.layer} are not")
    projections = {id(p) for projection in extractor.projections for p in projection.parameters() if p.dim() > 1}
    zero = [name for name, t in tensors.items() if id(t) in projections and _range(t) == (0.0, 0.0)]
    if teacher and zero:
        raise ValueError(f"{option}: its weights {_some(zero)} are all zero, so its relations are meaningless")


def _prefix(missing: Set[str], unexpected: Iterable[str]) -> str:
    """A prefix such as "module." that the names in the checkpoint have and those in the model lack; "" if none."""
    for name in unexpected:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in missing:
                return ".".join(parts[:i]) + "."
    return ""


def _reached(extractor: QKVExtractor) -> dict[str, Tensor]:
    """The parameters and persistent buffers on which Q, K and V depend, by their name in the state dict."""
    model = extractor.model
    unreached = set(extractor.unused_parameters())
    reached = {id(p) for name, p in model.named_parameters() if name not in unreached}
    saved = model.state_dict().keys()
    if any(name in saved for name, _ in model.named_buffers()):
        reached |= _used_buffers(extractor)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if name in saved and id(tensor) in reached}


def _used_buffers(extractor: QKVExtractor) -> set[int]:
    """The ids of the buffers of all modules that run before Q, K and V."""
    used: set[int] = set()
    handle = register_module_forward_pre_hook(
        lambda module, inputs: used.update(map(id, module.buffers(recurse=False)))
    )
    try:
        _run(extractor)
    finally:
        handle.remove()
    return used


def _run(extractor: QKVExtractor) -> QKV:
    """Q, K and V of two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(extractor.model.parameters()).device)
    with torch.no_grad():
        return extractor(input_ids=ids)


def _range(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest value (NaN if any value is NaN), computed without a copy."""
    if not tensor.numel() or not tensor.is_floating_point():
        return 1.0, 1.0
    low, high = torch.aminmax(tensor.detach())
    return float(low), float(high)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def embedding_rows(model: Any) -> int | None:
    """Number of rows of the token embedding; `None` if the model has none."""
    try:
        return model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return None


def check_ids(tokenizer: Any, teacher: Any, student: Any) -> None:
    """Raises `ValueError` if token ids exceed an embedding, or if the tokenizer has too few of them.

    The student is None if it has a vocabulary of its own.
    """
    ids = set(tokenizer.get_vocab().values())
    for name, model in (("teacher", teacher), ("student", student)):
        rows = embedding_rows(model)
        if rows is not None and max(ids) >= rows:
            raise ValueError(
                f"the teacher's tokenizer has ids up to {max(ids)}, but the {name}'s embedding has only {rows} rows, "
                f"0 to {rows - 1}"
            )
    rows = embedding_rows(teacher)
    if rows is not None and rows > len(ids) * MOST_ROWS_A_TOKEN + MOST_PADDING:
        raise ValueError(
            f"--teacher: its tokenizer has {len(ids)} tokens, but its embedding has {rows} rows: they do not belong "
            "together (if they do, shrink the embedding with resize_token_embeddings)"
        )


def check_masks(models: Any, tokenizer: DocumentTokenizer, max_seq_length: int, packing: bool) -> None:
    """Checks that a document has the same Q, K and V beside others as alone, and that the loss accepts them.

    Args:
        models: a `TeacherStudent`.

    Raises:
        ValueError: a model does not accept the mask of packed documents, or ignores it, or the loss does not accept
            the heads of the models.
    """
    length = min(max_seq_length, 512)
    device = next(models.student.model.parameters()).device
    largest = max(models.tokenizer.get_vocab().values())
    ids = np.random.default_rng(0).integers(largest + 1, size=length).astype(np.int32)
    packer = Packer(tokenizer, length, packing, models.max_document_length)
    for count in (length // 2 - 2, length // 4):
        packer.add(ids[:count])
    packer.flush()
    samples = packer.samples
    pieces = _pieces(samples)
    prefixes = np.array([piece.ids.size // 2 for piece in pieces]) if models.mask == "prefix" else None

    def batch(samples: Samples, packed: bool, prefixes: np.ndarray | None) -> Batch:
        return Batch(samples, device, packed=packed, causal=models.mask == "causal", prefixes=prefixes)

    together = batch(samples, packing, prefixes)
    projected = []
    for side in (models.teacher, models.student):
        alone = [
            batch(piece, side.packed, None if prefixes is None else prefixes[i : i + 1])
            for i, piece in enumerate(pieces)
        ]
        training = side.model.training
        side.model.eval()
        try:
            with torch.no_grad():
                parts = [[x.flatten(0, -2) for x in side.project(one)] for one in alone]
                try:
                    found = side.project(together)
                except Exception as error:  # models that take no mask of this form raise exceptions of any kind
                    raise ValueError(
                        f"--packing: the {side.role}'s {type(side.model).__name__} does not accept packed documents "
                        f"({one_line(error)}); use --no-packing"
                    ) from error
        finally:
            side.model.train(training)
        valid = together.positions != PADDING
        for name, x, y in zip(QKV._fields, map(torch.cat, zip(*parts, strict=True)), found, strict=True):
            y = y if packing else y[valid]
            difference = float((x - y).abs().max() / x.abs().max())
            if not difference < PACKING_TOLERANCE:
                raise ValueError(
                    f"--packing: the {name} of the {side.role}'s {type(side.model).__name__} depends on the other "
                    f"documents of a sample (relative difference {difference:.1e}); use --no-packing"
                )
        projected.append(found)
    models.loss.components(*projected, **together.loss_arguments())


def _pieces(samples: Samples) -> list[Samples]:
    """Every document of the samples as a sample of its own length, without padding."""
    pieces = []
    for ids, positions in zip(*samples, strict=True):
        bounds = [*np.flatnonzero(positions == 0), int((positions != PADDING).sum())]
        pieces += [Samples(ids[None, a:b], positions[None, a:b]) for a, b in pairwise(bounds)]
    return pieces


def check_text(tokenizer: DocumentTokenizer, texts: Iterable[str], teacher: Any, student: Any) -> None:
    """Checks the tokenizer against the first documents.

    Args:
        texts: the training documents, of which a few are read.
        student: the student; None if it has a vocabulary of its own.

    Raises:
        ValueError: the tokenizer does not know most of the words, or token ids exceed an embedding.
    """
    ids = check_tokenizer(tokenizer, texts)
    if not ids:
        return
    largest = max([*ids, *map(int, tokenizer.prefix), *map(int, tokenizer.suffix), tokenizer.pad])
    for name, model in (("teacher", teacher), ("student", student)):
        rows = embedding_rows(model)
        if rows is not None and largest >= rows:
            raise ValueError(
                f"the teacher's tokenizer returns id {largest}, but the {name}'s embedding has only {rows} rows"
            )


def check_saving(student: Any, tokenizer: Any, output: Path) -> None:
    """Saves student and tokenizer in a temporary folder below `output`, loads them and compares.

    The second copy of the student needs less memory than the optimizer, which is created later.

    Raises:
        ValueError: student or tokenizer cannot be saved or loaded, or differ after loading.
        OSError: the disk is full or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}trial-", dir=output, ignore_cleanup_errors=True) as folder:
        try:
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            if isinstance(error, OSError) or "os error" in str(error):  # safetensors and tokenizers
                raise write_error(error, output) from error
            raise ValueError(f"the student could not be saved: {one_line(error)}") from error
        try:
            again = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            words = AutoTokenizer.from_pretrained(folder).get_vocab()
        except Exception as error:
            raise ValueError(f"the student could be saved, but not loaded again: {one_line(error)}") from error
        before, after = student.state_dict(), again.state_dict()
        lost = [
            name
            for name in before.keys() | after.keys()
            if name not in before or name not in after or not torch.equal(before[name].cpu(), after[name])
        ]
        settings = _settings(student.config), _settings(again.config)
        lost += [
            name for name in settings[0].keys() | settings[1].keys() if settings[0].get(name) != settings[1].get(name)
        ]
        if words != tokenizer.get_vocab():
            lost.append("the tokenizer's vocabulary")
        if lost:
            raise ValueError(f"the student changes when it is saved and loaded: {_some(sorted(lost))}")


def _settings(config: Any) -> dict[str, str]:
    """The settings that the config's class declares, as JSON. Other settings have no effect on the model."""
    known = getattr(type(config), "__dataclass_fields__", config.to_dict()).keys() - {"architectures", "dtype"}
    return {
        key: json.dumps(value, default=str, sort_keys=True) for key, value in config.to_dict().items() if key in known
    }
