"""Signals that ask a run to stop after its step, so that nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

# Ctrl-C, schedulers, a closed session; the warnings of batch systems before they kill.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
# The others come twice by themselves: from the shell and the terminal, or once a second beyond a limit.
ABORTING = (signal.SIGINT, signal.SIGTERM)
# Nobody's unless a program makes them its own.
_FREE = (signal.SIGUSR1, signal.SIGXCPU)
# torchrun passes on a signal that its workers may have had from the terminal already.
ECHO_SECONDS = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class StopSignals:
    """While entered, `received` is the number of the first signal, else 0; the second SIGINT or SIGTERM aborts.

    A signal that is ignored stays so (nohup), and SIGUSR1 and SIGXCPU are left to the program that has handlers for
    them. Only a main thread can catch signals.
    """

    def __init__(self) -> None:
        self.received = 0
        self._first: dict[int, float] = {}  # when each came
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
