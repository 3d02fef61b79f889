"""The GPU backends in the order of their cost, for `backend="auto"`.

`costs.json` has the clocks that one multiprocessor needs per pair, by architecture, kind of call, dtype, head width and
length of the sequences. `python -m benchmarks costs` makes it: from bounds of the machine code (docs/static-cost.md),
and from measured times where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from minilm_kernels._choices import AUTO_BACKENDS, AutoBackend

from .inputs import RelationInputs

# Kinds of computation: a reduced loss with its gradient; a reduced loss without, or the rows of `reduction="none"`,
# which cost the same; the gradient of these rows.
Work = Literal["training", "evaluation", "rows gradient"]

FILE = Path(__file__).with_name("costs.json")
WIDTHS = (16, 32, 64, 128)  # a row of the table serves heads of up to this width, teacher or student
LENGTHS = (128, 512, 2048, 8192)  # and sequences of up to this length; the last one also serves longer sequences
_DTYPES = {1: "bfloat16", 2: "float16", 3: "float32"}


class Call(NamedTuple):
    """The properties of a call that its cost depends on. Sizes are rounded up to those of the table."""

    architecture: int  # such as 90
    multiprocessors: int
    work: Work
    dtype: str
    width: int
    length: int
    self_relations: int
    cross_relations: int
    heads: int  # in one relation of all sequences; at most the number of multiprocessors


class Order(NamedTuple):
    """Backends in the order in which they are tried, and the reason for the order."""

    backends: tuple[AutoBackend, ...]
    reason: str


def order(inputs: RelationInputs, work: Work) -> Order:
    """Returns the backends in the order in which they should serve a call. Reads no values of tensors."""
    if inputs.mask.device.type != "cuda":
        return Order(AUTO_BACKENDS, "default order")
    return _order(_describe(inputs, work))


@cache
def _device(index: int) -> tuple[int, int]:
    """Architecture, such as 90, and number of multiprocessors of a device."""
    props = torch.cuda.get_device_properties(index)
    return 10 * props.major + props.minor, props.multi_processor_count


def _describe(inputs: RelationInputs, work: Work) -> Call | None:
    """Returns the call's row of the table, or None if the table has no such rows."""
    tensors = (*inputs.teacher, *inputs.student)
    dtypes = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
    if any(x.dtype not in dtypes for x in tensors):
        return None
    width = next((w for w in WIDTHS if w >= max(x.shape[-1] for x in tensors)), None)
    if width is None:
        return None
    mask = inputs.mask
    longest = mask.token_shape[-1] if mask.max_seqlen is None else mask.max_seqlen
    device = mask.device.index
    architecture, multiprocessors = _device(torch.cuda.current_device() if device is None else device)
    of_self = sum(query == key for query, key in inputs.relations)
    return Call(
        architecture,
        multiprocessors,
        work,
        _DTYPES[max(dtypes[x.dtype] for x in tensors)],
        width,
        next((length for length in LENGTHS if length >= longest), LENGTHS[-1]),
        of_self,
        len(inputs.relations) - of_self,
        min(mask.num_sequences * inputs.heads, multiprocessors),
    )


class Row(NamedTuple):
    """Clocks per pair of one multiprocessor, by backend, and the backends with one block or program per head."""

    clocks: dict[AutoBackend, float]
    per_head: Sequence[AutoBackend]
    source: str  # "static" or "measured"


Key = tuple[int, str, str, int, int]  # architecture; "self training", "cross evaluation", ...; dtype; width; length


@cache
def table() -> dict[Key, Row]:
    """Returns the rows of `costs.json`."""
    return {
        (row["arch"], row["kind"], row["dtype"], row["width"], row["length"]): Row(
            row["clocks"], row["per_head"], row["source"]
        )
        for row in json.loads(FILE.read_text(encoding="utf-8"))
    }


@cache
def _order(call: Call | None) -> Order:
    """Cheapest first. Without rows for the call, the default order; backends of other devices come last."""
    if call is None:
        return Order(AUTO_BACKENDS, "default order: the cost table has no such dtypes or widths")
    known = {arch for arch, *_ in table() if arch <= call.architecture}
    rows = []
    for relation, count in (("self", call.self_relations), ("cross", call.cross_relations)):
        key = (max(known, default=0), f"{relation} {call.work}", call.dtype, call.width, call.length)
        if count and key not in table():
            return Order(AUTO_BACKENDS, f"default order: no row {key} in the cost table")
        if count:
            rows.append((table()[key], count))
    clocks: dict[AutoBackend, float] = {}
    for name in rows[0][0].clocks:
        if all(name in row.clocks for row, _ in rows):
            # A multiprocessor without a block has nothing to do.
            idle = [
                max(1.0, call.multiprocessors / (count * call.heads)) if name in row.per_head else 1.0
                for row, count in rows
            ]
            clocks[name] = sum(
                count * row.clocks[name] * factor for (row, count), factor in zip(rows, idle, strict=True)
            )
    cheapest = sorted(clocks, key=lambda name: (clocks[name], AUTO_BACKENDS.index(name)))
    listed = ", ".join(f"{name} {clocks[name]:.3f}" for name in cheapest)
    sources = " and ".join(dict.fromkeys(row.source for row, _ in rows))
    others = [name for name in AUTO_BACKENDS if name not in clocks]
    return Order((*cheapest, *others), f"clocks per pair and multiprocessor ({sources}): {listed}")
