"""Layouts: how the documents of a step become samples, and how the models keep documents apart."""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """A way to make samples of the documents of a step.

    Attributes:
        packing: True to fill samples with documents; False for one document per sample, with padding.
        attention: the option `--attention` of the training loop.
        sorted: True to sort the samples by length, so that a micro-batch has little padding.
    """

    about: str
    packing: bool
    attention: str = "mask"
    sorted: bool = False


LAYOUTS = {
    "padded": Layout("one document a sample, in order of arrival", packing=False),
    "sorted": Layout("one document a sample, sorted by length", packing=False, sorted=True),
    "dense": Layout("packed samples, with an attention mask of S x S", packing=True),
    "packed": Layout("packed samples as one row of documents, without a mask", packing=True, attention="packed"),
}
