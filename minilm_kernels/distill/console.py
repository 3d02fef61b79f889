"""Lines of a run on standard output and error. A stream that is closed, full or read by nobody never ends a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def say(message: str) -> None:
    """A line of its own on standard error, above a progress bar."""
    from tqdm import tqdm  # the command line says some things before it imports anything

    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            tqdm.write(f"minilm-distill: {message}", file=sys.stderr)


def flush(*streams: TextIO | None) -> None:
    """Writes what is buffered. A stream that cannot be written is turned to the null device: the interpreter would
    complain of it at its end (a reader that has gone, as in `| head`)."""
    for stream in filter(None, streams):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


class _Forgiving:
    """A text stream that loses what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            with suppress(OSError, ValueError):
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """While entered, nothing that writes to `sys.stdout` or `sys.stderr` fails, progress bars of libraries included."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout, sys.stderr = (_Forgiving(stream or nowhere) for stream in before)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            flush(*before)
