"""metrics.jsonl, and the progress of a run: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import read_file, sync, write_error, write_file
from .console import say

QUIET_SECONDS = 30.0  # time between two lines if standard error is not a terminal

EvalRecords = tuple[dict[str, Any], dict[str, Any]] | None


class Metrics:
    """metrics.jsonl: one JSON object per line, with `step` and `split` ("train" or "eval").

    When a run is resumed, lines after its step are removed, as is an incomplete last line. Other lines that cannot be
    read are reported and kept.

    Args:
        path: the file.
        step: number of steps that are done; 0 starts a new file.
        evaluated: True if the student has been evaluated at `step`. Otherwise the eval line of `step` is removed too.
    """

    def __init__(self, path: Path, step: int, *, evaluated: bool = True) -> None:
        self.path = path
        kept = []
        for number, line, record in _lines(path) if step else []:
            if isinstance(record, str):
                say(f"{path}, line {number}: {record}; the line is kept")
            elif record["step"] > step or (record["step"] == step and record.get("split") == "eval" and not evaluated):
                continue
            kept.append(line + b"\n")
        write_file(path, b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line. Raises `OSError` if the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise write_error(error, self.path) from error

    def sync(self) -> None:
        """Waits until the lines are on disk."""
        try:
            sync(self.path)
        except OSError as error:
            raise write_error(error, self.path) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The readable lines of a metrics.jsonl; empty if there is no such file."""
    return [record for _, _, record in _lines(path) if isinstance(record, dict)]


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | str]]:
    """Yields (line number, line, record or error), without the incomplete last line of a killed run."""
    try:
        *lines, rest = read_file(path).split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate([*lines, rest], 1):
        record = _record(line)
        if isinstance(record, dict) or (number <= len(lines) and line.strip()):
            yield number, line, record


def _record(line: bytes) -> dict[str, Any] | str:
    """The record of a line, or a description of the error in it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return "not an object with an integer step"
    return record


def eval_records(path: Path, *, best: bool = False) -> EvalRecords:
    """The first eval record of a metrics.jsonl and its last one; `None` if it has none.

    Args:
        best: True for the one with the lowest loss of a trained student, instead of the last one.
    """
    records = [record for record in read_metrics(path) if record.get("split") == "eval"]
    if not records:
        return None
    trained = [record for record in records if record["step"]]
    return records[0], min(trained, key=lambda record: record["eval_loss"]) if best and trained else records[-1]


class Progress:
    """A progress bar with loss, tokens/s and remaining time; without a terminal, a line every `QUIET_SECONDS`.

    The bar and the remaining time are those of all stages of a run; steps in messages are those of the stage.

    Args:
        step: number of steps of the stage that are done.
        max_steps: number of steps of the stage.
        shown: False to print nothing.
        stage: name of the stage, "" if there is only one.
        before, after: number of steps of earlier and of later stages.
    """

    def __init__(
        self, step: int, max_steps: int, shown: bool, *, stage: str = "", before: int = 0, after: int = 0
    ) -> None:
        self._shown, self._max_steps, self._after = shown, max_steps, after
        self._prefix = f"{stage}: " if stage else ""
        self._bar = tqdm(
            desc=stage or None,
            total=before + max_steps + after,
            initial=before + step,
            unit="step",
            leave=not after,
            disable=None if shown else True,
            dynamic_ncols=True,
        )
        self._first, self._began, self._last = step, time.monotonic(), 0.0

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update()

    def train(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows the latest training loss."""
        self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        now = time.monotonic()
        if self._bar.disable and (now - self._last >= QUIET_SECONDS or step == self._max_steps):
            self._last = now
            left = (now - self._began) / (step - self._first) * (self._max_steps - step + self._after)
            time_left = tqdm.format_interval(left)
            self.say(
                f"step {step}/{self._max_steps}, loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {time_left} left"
            )

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            say(f"{self._prefix}{message}")

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
