"""Backends `cpu` and `cuda`: C++ and CUDA C++ kernels in native libraries.

The libraries are built when the package is installed (setup.py). Through PyTorch's stable ABI they register the private
operators `torch.ops.minilm_kernels_cpu` and `torch.ops.minilm_kernels_cuda`. This module loads the libraries and turns
`RelationInputs` into the operators' arguments. docs/cpu.md and docs/cuda.md describe the kernels.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm_kernels._choices import Reduction
from minilm_kernels.relation.inputs import RelationInputs, Scaling, grad_buffers

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

    def __init__(self, name: str) -> None:
        self.name = name
        self.device_type = name
        self.library = _PACKAGE / f"_{name}.abi3.so"
        self.operators: Any = getattr(torch.ops, f"minilm_kernels_{name}")
        self.load_error: str | None = NOT_LOADED  # reason why the library cannot be used; None once it is loaded
        self._loading = threading.Lock()

    def unavailable_reason(self) -> str | None:
        if self.load_error == NOT_LOADED:
            with self._loading:
                if self.load_error == NOT_LOADED:  # no other thread has loaded it
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

    def forward_reduced(
        self, inputs: RelationInputs, reduction: Reduction, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Backend`."""
        raise NotImplementedError

    def forward_none(self, inputs: RelationInputs) -> Tensor:
        mask = inputs.mask
        *batch, positions = mask.token_shape
        shape = (len(inputs.relations), *batch, inputs.heads, positions)
        # Kernels write rows of valid tokens only.
        new = torch.empty if mask.attention_mask is None and mask.query_mask is None else torch.zeros
        out = new(shape, dtype=torch.float32, device=mask.device)
        self._run(inputs, rows=out)
        return out

    def backward_none(self, inputs: RelationInputs, row_grads: Tensor) -> list[Tensor]:
        grads = self._new_gradients(inputs)
        self._run(inputs, row_grads=row_grads.float().contiguous(), grads=grads)
        return grads

    def _new_gradients(self, inputs: RelationInputs) -> list[Tensor]:
        """Allocates the gradients. Kernels set those of padding to 0."""
        return [
            torch.empty(inputs.student[m].shape, dtype=torch.float32, device=inputs.mask.device)
            for _, m in grad_buffers(inputs.relations)
        ]

    def _run(
        self,
        inputs: RelationInputs,
        reduction: Reduction = "sum",
        row_grads: Tensor | None = None,
        values: Tensor | None = None,
        rows: Tensor | None = None,
        grads: Sequence[Tensor] = (),
    ) -> None:
        """Calls the library's operator. A call for rows, or with `row_grads`, has the reduction "sum"."""
        raise NotImplementedError

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


class CPUBackend(NativeBackend):
    """Backend `cpu`: AVX-512, AVX2 or portable kernels, chosen for the processor at run time."""

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

    def forward_reduced(
        self, inputs: RelationInputs, reduction: Reduction, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        values = torch.empty(len(inputs.relations), dtype=torch.float32)
        grads = self._new_gradients(inputs) if gradient else []
        self._run(inputs, reduction, values=values, grads=grads)
        return inputs.total(values), grads

    def _run(
        self,
        inputs: RelationInputs,
        reduction: Reduction = "sum",
        row_grads: Tensor | None = None,
        values: Tensor | None = None,
        rows: Tensor | None = None,
        grads: Sequence[Tensor] = (),
    ) -> None:
        mask = inputs.mask
        weights = None if values is None else mask.sequence_weights(reduction, inputs.heads, torch.float32).contiguous()
        self.operators.relation_kl(
            *_tensors_and_scales(inputs),
            *mask.unpad(),
            None if mask.query_mask is None else mask.counted.contiguous(),
            not mask.bidirectional,
            weights,
            row_grads,
            values,
            rows,
            list(grads),
            self.instruction_set(),
        )


class CUDABackend(NativeBackend):
    """Backend `cuda`: CUDA C++ kernels, which the first call of each shape compiles.

    The library contains host code only and can be built and loaded without CUDA. No call waits for the device. A call
    whose kernels are loaded can be captured in a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__("cuda")
        self.loader = KernelLoader()
        self.reasons: dict[tuple, list[str]] = {}  # by device, widths and dtypes

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
        indices, tensors = _indices(inputs), (*inputs.teacher, *inputs.student)
        key = (device, *indices, *((x.dtype, x.shape[-1]) for x in tensors))
        if key not in self.reasons:
            try:
                reason = self.operators.unsupported_reason(inputs.teacher, inputs.student, indices, device)
            except RuntimeError as error:  # raised by the driver library
                return [str(error)]
            self.reasons[key] = [reason] if reason else []
        return self.reasons[key]

    def forward_reduced(
        self, inputs: RelationInputs, reduction: Reduction, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        shape = (len(inputs.relations),) if inputs.weights is None else ()
        values = torch.empty(shape, dtype=torch.float32, device=inputs.mask.device)
        grads = self._new_gradients(inputs) if gradient else []
        self._run(inputs, reduction, values=values, grads=grads)
        return values, grads

    def _run(
        self,
        inputs: RelationInputs,
        reduction: Reduction = "sum",
        row_grads: Tensor | None = None,
        values: Tensor | None = None,
        rows: Tensor | None = None,
        grads: Sequence[Tensor] = (),
    ) -> None:
        """The masks are passed as they are: kernels make the lists of tokens and the weights from them."""
        mask = inputs.mask
        device, stream = self.device(mask.device)
        self._launch(
            self.operators.relation_kl,
            *_tensors_and_scales(inputs),
            mask.attention_mask,
            None if mask.cu_seqlens is None else mask.cu_seqlens.contiguous(),
            mask.prefix_integers(),
            mask.query_mask,
            -1 if mask.max_seqlen is None else mask.max_seqlen,
            not mask.bidirectional,
            reduction,
            None if values is None or inputs.weights is None else list(inputs.weights),
            row_grads,
            values,
            rows,
            list(grads),
            stream,
            device,
        )

    def scale(self, scaling: Scaling) -> list[Tensor] | None:
        """See `Backend`."""
        results = scaling.results(self.device_type)
        if results is not None:
            device, stream = self.device(scaling.upstream.device)
            self._launch(
                self.operators.scale,
                scaling.parts,
                scaling.owners,
                scaling.relations,
                scaling.weights,
                scaling.upstream,
                results,
                stream,
                device,
            )
        return results

    def _launch(self, operator: Any, *arguments: Any) -> None:
        """Calls an operator whose last argument is the number of the device. Loads the kernels that it reports."""
        if missing := operator(*arguments):
            self.loader.load(missing.split("\n"), arguments[-1], self.operators)
            operator(*arguments)


def _tensors_and_scales(inputs: RelationInputs) -> tuple[Any, ...]:
    scales = [scale for relation in inputs.relations for scale in inputs.scales(relation)]
    return inputs.teacher, inputs.student, _indices(inputs), scales


def _indices(inputs: RelationInputs) -> list[int]:
    return [m for relation in inputs.relations for m in relation]


@cache
def _instruction_sets() -> list[str]:
    return torch.ops.minilm_kernels_cpu.instruction_sets().split(",")


cpu = CPUBackend()
cuda = CUDABackend()
