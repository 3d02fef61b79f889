"""Chooses the backend of a call and raises an error if no backend can serve it.

To add a backend, write a module with the functions of `inputs.Backend`, add its name to `minilm_kernels/_choices.py`,
and add the module to `MODULES`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from torch import Tensor

from minilm_kernels._choices import AUTO_BACKENDS, BACKENDS, BackendName

from . import costs
from .backends import blocked, native, reference
from .backends.triton import launch as triton
from .inputs import Backend, BackendUnavailable, RelationInputs, Scaling

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_warned: set[str] = set()
_warning = threading.Lock()

MODULES: dict[BackendName, Backend] = dict(
    zip(BACKENDS, (native.cuda, triton, native.cpu, blocked, reference), strict=True)
)


def backend_status() -> dict[str, str]:
    """Returns the state of every backend in this process.

    Returns:
        A dict from each backend's name to `"ready"`, or to the reason why the backend cannot run here. The backends are
        in the order in which `backend="auto"` tries them if it does not know their cost for a call. `"auto"` never
        chooses the last one, `"reference"`.

    Example:
        >>> from minilm_kernels import backend_status
        >>> status = backend_status()
        >>> list(status)
        ['cuda', 'triton', 'cpu', 'torch', 'reference']
        >>> status["torch"]
        'ready'
    """
    return {name: module.unavailable_reason() or "ready" for name, module in MODULES.items()}


def run(name: BackendName, inputs: RelationInputs, work: costs.Work, call: Callable[[Backend], _Result]) -> _Result:
    """Returns `call(backend)` for the backend `name` or, if `name` is "auto", for the cheapest that can serve the call.

    The order of costs is that of `costs.order`. A message at level DEBUG gives the reason for the choice.

    Raises:
        RuntimeError: the backend cannot serve the call; the message gives every reason.
    """
    if name != "auto":
        reasons = _unsupported_reasons(name, inputs)
        if reasons:
            usable = ", ".join(n for n, status in backend_status().items() if status == "ready")
            raise RuntimeError(f"backend: {name!r} cannot serve this call: {'; '.join(reasons)}. Usable here: {usable}")
        return call(MODULES[name])
    candidates, reason = costs.order(inputs, work)
    for candidate in candidates:
        if not _unsupported_reasons(candidate, inputs):
            _log.debug("backend %s serves a call (%s); %s", candidate, work, reason)
            try:
                return call(MODULES[candidate])
            except BackendUnavailable as failure:
                warn_once(f"backend {candidate} failed; the next one serves the call: {failure}")
    raise RuntimeError("backend: none can serve this call")


def scale(name: BackendName, scaling: Scaling) -> list[Tensor] | None:
    """Returns the results of a `Scaling` by the backend `name` or, if it is "auto", by the first that serves it.

    Returns None if none does.
    """
    for candidate in AUTO_BACKENDS if name == "auto" else (name,):
        backend = MODULES[candidate]
        if hasattr(backend, "scale") and backend.unavailable_reason() is None:
            with suppress(BackendUnavailable):
                if (results := backend.scale(scaling)) is not None:
                    return results
    return None


def warn_once(message: str) -> None:
    """Logs a warning unless the same one was logged before, by any thread."""
    with _warning:
        first = message not in _warned
        _warned.add(message)
    if first:
        _log.warning(message)


def _unsupported_reasons(name: BackendName, inputs: RelationInputs) -> list[str]:
    """Returns every reason why a backend cannot serve the call, and logs them at level DEBUG."""
    unavailable = MODULES[name].unavailable_reason()
    reasons = [unavailable] if unavailable else MODULES[name].unsupported_reasons(inputs)
    if reasons:
        _log.debug("backend %s does not serve: %s", name, "; ".join(reasons))
    return reasons
