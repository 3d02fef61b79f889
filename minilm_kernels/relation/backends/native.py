"""Backends `cpu` and `cuda`: C++ and CUDA C++ kernels in native libraries.

The libraries are built when the package is installed (setup.py). Through PyTorch's stable ABI they register the private
operators `torch.ops.minilm_kernels_cpu` and `torch.ops.minilm_kernels_cuda`. This module loads the libraries and turns
`RelationInputs` into the operators' arguments. docs/cpu.md and docs/cuda.md describe the kernels.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm_kernels.relation.inputs import RelationInputs, grad_buffers
from minilm_kernels.relation.masks import add_fault

from . import cuda_compiler
from .cuda_loader import KernelLoader

_PACKAGE = Path(__file__).parents[2]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NOT_LOADED = "not loaded yet"
INSTRUCTION_SET_VARIABLE = "MINILM_KERNELS_CPU"  # overrides the choice; one of `instruction_sets()`


class NativeBackend:
    """Implements the `Backend` interface by a native library. Subclasses add the parts that differ between devices.

    Args:
        name: name of the backend. The package has the library as `_<name>.abi3.so`.
    """

    grads_cleared = False  # True if the library sets the gradients of padding to zero

    def __init__(self, name: str) -> None:
        self.name = name
        self.device_type = name
        self.library = _PACKAGE / f"_{name}.abi3.so"
        self.operators: Any = getattr(torch.ops, f"minilm_kernels_{name}")
        self.load_error: str | None = NOT_LOADED  # reason why the library cannot be used; None once it is loaded

    def unavailable_reason(self) -> str | None:
        if self.load_error == NOT_LOADED:
            self.load_error = self._load()
        return self.load_error

    def unsupported_reasons(self, inputs: RelationInputs) -> list[str]:
        reasons = []
        others = {x.dtype for x in (*inputs.teacher, *inputs.student)} - set(_DTYPES)
        if others:
            reasons.append(f"it supports float32, float16 and bfloat16, got {', '.join(map(str, others))}")
        device = inputs.mask.device
        if device.type != self.device_type:
            reasons.append(f"it computes on {self.device_type} devices, but the tensors are on {device}")
        return reasons

    def forward_reduced(self, inputs: RelationInputs, weights: Tensor, gradient: bool) -> tuple[Tensor, list[Tensor]]:
        inputs, fault = self._sanitized(inputs)
        values = weights.new_empty(len(inputs.relations))
        grads = self._new_gradients(inputs) if gradient else []
        self._run(inputs, weights=add_fault(weights, fault).contiguous(), values=values, grads=grads)
        return add_fault(values, fault), grads

    def forward_none(self, inputs: RelationInputs) -> Tensor:
        inputs, fault = self._sanitized(inputs)
        *batch, positions = inputs.mask.token_shape
        shape = (len(inputs.relations), *batch, inputs.heads, positions)
        new = torch.zeros if _padded(inputs) or inputs.mask.query_mask is not None else torch.empty
        out = new(shape, dtype=torch.float32, device=inputs.mask.device)
        self._run(inputs, rows=out)
        return add_fault(out, fault)

    def backward_none(self, inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
        inputs, fault = self._sanitized(inputs)
        grads = self._new_gradients(inputs)
        self._run(inputs, row_grads=add_fault(row_grads.float(), fault).contiguous(), grads=grads)
        return grads

    def _new_gradients(self, inputs: RelationInputs) -> list[Tensor]:
        """Allocates the gradients. Kernels write those of valid tokens only; those of padding must be zero."""
        new = torch.zeros if _padded(inputs) and not self.grads_cleared else torch.empty
        return [
            new(inputs.student[m].shape, dtype=torch.float32, device=inputs.mask.device)
            for _, m in grad_buffers(inputs.relations)
        ]

    def _run(
        self,
        inputs: RelationInputs,
        weights: Tensor | None = None,
        row_grads: Tensor | None = None,
        values: Tensor | None = None,
        rows: Tensor | None = None,
        grads: list[Tensor] | None = None,
    ) -> None:
        tokens, starts, prefixes = inputs.mask.unpad()
        arguments = (
            inputs.teacher,
            inputs.student,
            _indices(inputs),
            [scale for relation in inputs.relations for scale in inputs.scales(relation)],
            tokens,
            starts,
            prefixes,
            None if inputs.mask.query_mask is None else inputs.mask.counted.contiguous(),
            not inputs.mask.bidirectional,
            weights,
            row_grads,
            values,
            rows,
            grads or [],
        )
        self._call(inputs, arguments)

    def _missing_reason(self) -> str:
        """Returns why there is no library file. The reason includes the note that setup.py writes if a build fails."""
        reason = f"the package was installed without its {self.name.upper()} library"
        note = self.library.with_name(f"_{self.name}.missing")
        return f"{reason}: {note.read_text(encoding='utf-8')}" if note.exists() else reason

    def _load_library(self) -> str | None:
        try:
            torch.ops.load_library(self.library)
        except OSError as error:
            return f"its library does not load: {error}"
        return None

    def _load(self) -> str | None:
        """Loads the library. Returns why the backend cannot run in this process, or None."""
        raise NotImplementedError

    def _sanitized(self, inputs: RelationInputs) -> tuple[RelationInputs, Tensor | None]:
        """Returns inputs whose mask is safe to index with, and the fault to add; see `Mask.sanitize_bounds`."""
        raise NotImplementedError

    def _call(self, inputs: RelationInputs, arguments: tuple[Any, ...]) -> None:
        """Calls the library's operator with `arguments` and the additional arguments of this kind of device."""
        raise NotImplementedError


class CPUBackend(NativeBackend):
    """Backend `cpu`: AVX-512, AVX2 or portable kernels, chosen for the processor at run time."""

    grads_cleared = True

    def __init__(self) -> None:
        super().__init__("cpu")

    def instruction_sets(self) -> list[str]:
        """The instruction sets that this processor supports, best first. The library must be loaded."""
        return _instruction_sets()

    def instruction_set(self) -> str:
        """The instruction set in use: `$MINILM_KERNELS_CPU`, or the best one."""
        return os.environ.get(INSTRUCTION_SET_VARIABLE) or self.instruction_sets()[0]

    def unsupported_reasons(self, inputs: RelationInputs) -> list[str]:
        reasons = super().unsupported_reasons(inputs)
        chosen = os.environ.get(INSTRUCTION_SET_VARIABLE)
        if chosen and chosen not in self.instruction_sets():
            supported = ", ".join(self.instruction_sets())
            reasons.append(f"{INSTRUCTION_SET_VARIABLE} is {chosen!r}, but this processor runs {supported}")
        return reasons

    def _load(self) -> str | None:
        if self.library.exists():
            reason = self._load_library()
            if reason is None:
                return None
        else:
            reason = self._missing_reason()
            if not self._is_unexpected():
                return reason
        warnings.warn(f"minilm_kernels: on the CPU the slower backend `torch` serves; {reason}", stacklevel=3)
        return reason

    def _missing_reason(self) -> str:
        source = self.library.parents[1]
        if self._is_source_tree() and not self._has_note():
            return (
                f"this is the source tree {source}, in which the CPU library is not built; build it there with "
                "`pip install -e .`, or, if the package is installed elsewhere, start Python in another folder"
            )
        return super()._missing_reason()

    def _is_unexpected(self) -> bool:
        """Tells whether the library is missing although the user did not ask for an installation without it."""
        return self._has_note() or self._is_source_tree()

    def _has_note(self) -> bool:
        return self.library.with_name("_cpu.missing").exists()

    def _is_source_tree(self) -> bool:
        return (self.library.parents[1] / "csrc" / "cpu").is_dir()

    def _sanitized(self, inputs: RelationInputs) -> tuple[RelationInputs, Tensor | None]:
        return inputs, None  # cu_seqlens has been validated, because it is on the CPU

    def _call(self, inputs: RelationInputs, arguments: tuple[Any, ...]) -> None:
        self.operators.relation_kl(*arguments, self.instruction_set())


class CUDABackend(NativeBackend):
    """Backend `cuda`: CUDA C++ kernels, which the first call of each shape compiles.

    The library contains host code only and can be built and loaded without CUDA. No call waits for the device. A call
    whose kernels are loaded can be captured in a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__("cuda")
        self.loader = KernelLoader()

    def device(self, device: torch.device) -> tuple[int, int]:
        """Number and current stream of a device."""
        return device.index or 0, torch.cuda.current_stream(device).cuda_stream

    def _load(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        if not self.library.exists():
            return self._missing_reason()
        return self._load_library() or cuda_compiler.unavailable_reason()

    def unsupported_reasons(self, inputs: RelationInputs) -> list[str]:
        if reasons := super().unsupported_reasons(inputs):
            return reasons
        device, _ = self.device(inputs.mask.device)
        try:
            reason = self.operators.unsupported_reason(inputs.teacher, inputs.student, _indices(inputs), device)
        except RuntimeError as error:  # raised by the driver library
            reason = str(error)
        return [reason] if reason else []

    def _sanitized(self, inputs: RelationInputs) -> tuple[RelationInputs, Tensor | None]:
        mask, fault = inputs.mask.sanitize_bounds()
        return replace(inputs, mask=mask), fault

    def _call(self, inputs: RelationInputs, arguments: tuple[Any, ...]) -> None:
        mask = inputs.mask
        max_length = mask.token_shape[-1] if mask.max_seqlen is None else mask.max_seqlen
        device, stream = self.device(mask.device)
        arguments = (*arguments, _padded(inputs), max_length, stream, device)
        if missing := self.operators.relation_kl(*arguments):
            self.loader.load(missing.split("\n"), device, self.operators)
            self.operators.relation_kl(*arguments)


def _padded(inputs: RelationInputs) -> bool:
    """Tells whether some tokens may be padding. Packed inputs have none: their (sanitized) bounds cover every token."""
    return inputs.mask.attention_mask is not None


def _indices(inputs: RelationInputs) -> list[int]:
    return [m for relation in inputs.relations for m in relation]


@cache
def _instruction_sets() -> list[str]:
    return torch.ops.minilm_kernels_cpu.instruction_sets().split(",")


cpu = CPUBackend()
cuda = CUDABackend()
