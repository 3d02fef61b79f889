"""What a run tells while it runs: metrics.jsonl, and a progress bar, or a line now and then where nobody watches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import explained, read_file, sync, write_file
from .console import say

QUIET_SECONDS = 30.0  # between two lines where standard error is no terminal

HeldOutRecords = tuple[dict[str, Any], dict[str, Any]] | None


class Metrics:
    """metrics.jsonl: one JSON object a line, with `step` and `split` ("train" or "heldout")."""

    def __init__(self, path: Path, step: int, *, measured: bool = True) -> None:
        """Drops the lines after `step`, the held-out line of `step` itself unless `measured`, and a cut last line.

        Any other line that cannot be read is reported and stays as it is.
        """
        self.path = path
        kept = []
        for number, line, record in _lines(path) if step else []:
            if isinstance(record, str):
                say(f"{path}, line {number}: {record}; the line stays as it is")
            elif record["step"] > step or (
                record["step"] == step and record.get("split") == "heldout" and not measured
            ):
                continue
            kept.append(line + b"\n")
        write_file(path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line. Raises `OSError` if the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise explained(error, self.path) from error

    def sync(self) -> None:
        """Waits until the lines are on disk."""
        try:
            sync(self.path)
        except OSError as error:
            raise explained(error, self.path) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a metrics.jsonl, none if there is no such file."""
    return [record for _, _, record in _lines(path) if isinstance(record, dict)]


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | str]]:
    """(number, line, its record or what is wrong with it); without the end that a killed run left half written."""
    try:
        *lines, rest = read_file(path).split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate([*lines, rest], 1):
        record = _record(line)
        if isinstance(record, dict) or (number <= len(lines) and line.strip()):
            yield number, line, record


def _record(line: bytes) -> dict[str, Any] | str:
    """The record in a line of metrics.jsonl, or what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return "not an object with a whole number as step"
    return record


def heldout_records(path: Path) -> HeldOutRecords:
    """The first and the last held-out record of a metrics.jsonl, `None` if it has none."""
    records = [record for record in read_metrics(path) if record.get("split") == "heldout"]
    return (records[0], records[-1]) if records else None


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere one line in `QUIET_SECONDS`."""

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self._shown, self._steps = shown, steps
        self._bar = tqdm(total=steps, initial=step, unit="step", disable=None if shown else True, dynamic_ncols=True)
        self._first, self._began, self._last = step, time.monotonic(), 0.0

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def train(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the latest training loss."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        now = time.monotonic()
        if self._bar.disable and (now - self._last >= QUIET_SECONDS or step == self._steps):
            self._last = now
            left = (now - self._began) / (step - self._first) * (self._steps - step)
            time_left = tqdm.format_interval(left)
            self.say(f"step {step}/{self._steps}, loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {time_left} left")

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._shown:
            say(message)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
