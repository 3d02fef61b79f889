"""Signals that stop a run after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

# Ctrl-C, schedulers and closed terminals send the first three. Batch systems send the last two as a warning before they
# kill a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
# The second signal of one of these numbers aborts the run. Other signals may arrive twice by accident: SIGHUP from the
# shell and from the terminal, SIGXCPU once per second above the limit.
ABORTING = (signal.SIGINT, signal.SIGTERM)
# These signals are not caught if the program already has a handler for them.
_FREE = (signal.SIGUSR1, signal.SIGXCPU)
# torchrun forwards signals that the terminal may have sent to the workers already, on a busy machine seconds later.
ECHO_SECONDS = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class StopSignals:
    """Context manager that records the first stop signal; a second SIGINT or SIGTERM aborts the process.

    Signals that are ignored on entry, as under nohup, remain ignored. SIGUSR1 and SIGXCPU are not caught if the program
    already has a handler for them. Outside of the main thread, no signal is caught.

    Attributes:
        received: number of the first signal, 0 if there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first: dict[int, float] = {}  # signal -> time of arrival
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                left = handler in (signal.SIG_IGN, None) or (number in _FREE and handler is not signal.SIG_DFL)
                if not left:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in self._first:
            self._first[number] = time.monotonic()
            if not self.received:
                self.received = number
                again = "; the same signal again aborts at once" if number in ABORTING else ""
                with suppress(OSError, ValueError):  # the terminal may be gone
                    if sys.__stderr__ is not None:
                        message = f"\nminilm-distill: stopping after this step{again}\n"
                        os.write(sys.__stderr__.fileno(), message.encode())
        elif number in ABORTING and time.monotonic() - self._first[number] >= ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
