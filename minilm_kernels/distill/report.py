"""What a run tells while it runs: metrics.jsonl, and a progress bar, or a line now and then where nobody watches."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import explained, sync, write_file

QUIET_SECONDS = 30.0  # between two lines where standard error is no terminal

HeldOutRecords = tuple[dict[str, Any], dict[str, Any]] | None


class Metrics:
    """metrics.jsonl: one JSON object a line, with `step` and `split` ("train" or "heldout")."""

    def __init__(self, path: Path, step: int) -> None:
        """Drops the lines after `step`, and a line that a broken run left unfinished."""
        self.path = path
        kept = [json.dumps(record) for record in read_metrics(path) if record["step"] <= step] if step else []
        write_file(path, "".join(line + "\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line. Raises `OSError` if the disk is full."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise explained(error, self.path) from error

    def sync(self) -> None:
        """Waits until the lines are on disk."""
        sync(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, none if there is no such file."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the last line of a killed run
    return records


def heldout_records(path: Path) -> HeldOutRecords:
    """The first and the last held-out record of a metrics.jsonl, `None` if it has none."""
    records = [record for record in read_metrics(path) if record["split"] == "heldout"]
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
            tqdm.write(f"minilm-distill: {message}", file=sys.stderr)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
