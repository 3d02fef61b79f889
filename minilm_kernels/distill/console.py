"""Messages of a run on standard output and error. A closed or full stream never ends a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


def say(message: str) -> None:
    """Prints a line on standard error, above a progress bar if there is one."""
    if sys.stderr is None:
        return
    line = f"minilm-distill: {message}"
    with suppress(OSError, ValueError):
        if sys.modules.get("tqdm"):  # otherwise there is no progress bar
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


def flush(*streams: TextIO | None) -> None:
    """Flushes streams. A stream that fails is redirected to the null device, so that the interpreter reports no error
    at exit, for example after `| head`."""
    for stream in filter(None, streams):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


class _Forgiving:
    """A text stream that ignores write errors."""

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
    """Ignores write errors of `sys.stdout` and `sys.stderr` inside the block, also for writes of progress bars."""
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout, sys.stderr = (_Forgiving(stream or nowhere) for stream in before)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            flush(*before)
