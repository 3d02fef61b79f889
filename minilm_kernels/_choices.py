"""Values that the public arguments `backend` and `reduction` accept. This module does not import torch."""

from typing import Literal, get_args

AutoBackend = Literal["cuda", "triton", "cpu", "torch"]
BackendName = Literal["auto", AutoBackend, "reference"]
Reduction = Literal["sequence", "token", "sum", "none"]

AUTO_BACKENDS: tuple[AutoBackend, ...] = get_args(AutoBackend)  # in the order in which backend="auto" tries them
BACKENDS: tuple[BackendName, ...] = tuple(name for name in get_args(BackendName) if name != "auto")
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
