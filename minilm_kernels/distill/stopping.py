"""SIGINT and SIGTERM: the first asks the run to stop after its step, the second aborts at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes on a signal that its workers may have had from the terminal already.
ECHO_SECONDS = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class StopSignals:
    """While entered, `received` is the number of the first signal, else 0. Only a main thread can catch signals."""

    def __init__(self) -> None:
        self.received = 0
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._at = number, time.monotonic()
            message = "stopping after this step; the same signal again aborts at once"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nminilm-distill: {message}\n".encode())
        elif time.monotonic() - self._at >= ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
