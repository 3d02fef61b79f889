"""`--report-to`: the metrics in TensorBoard and Weights & Biases, through their own packages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from minilm_kernels._extras import optional_imports

from .checkpoint import read_file, write_file
from .config import DistillConfig
from .console import say

_WANDB_ID = "wandb-run-id"  # file with the id of the run, which a resumed run continues


class Tracker(Protocol):
    """Receives metrics. Lines that a resumed run repeats replace the earlier ones, as far as the package can do so."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, config: DistillConfig, step: int) -> None:
        with optional_imports("tensorboard", "--report-to tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: DistillConfig, step: int) -> None:
        with optional_imports("wandb", "--report-to wandb"):
            import wandb
        file = folder / _WANDB_ID
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minilm-distill"),
            name=folder.name,
            id=read_file(file).decode() if step and file.exists() else None,
            resume="allow",
            dir=str(folder),
            config=config.published().as_dict(),
        )
        write_file(file, self._run.id.encode())

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[Path, DistillConfig, int], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


class Trackers:
    """The trackers of a run. A tracker that fails during the run is reported and left out, and the run continues.

    Args:
        folder: folder of the run or stage.
        step: number of steps that are done.

    Raises:
        ImportError: the package of a tracker is not installed.
        RuntimeError: a tracker does not start, for example without an account.
    """

    def __init__(self, folder: Path, config: DistillConfig, step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in config.report_to:
            try:
                self._open[name] = _KINDS[name](folder, config, step)
            except (ImportError, OSError):
                raise
            except Exception as error:
                raise RuntimeError(f"--report-to {name}: it does not start: {error}") from error

    def log(self, step: int, split: str, record: dict[str, Any]) -> None:
        """Sends the numbers of a record, as `train/loss` and so on."""
        values = {
            f"{split}/{name.removeprefix('eval_')}": float(value)
            for name, value in record.items()
            if isinstance(value, (int, float))
        }
        self._each(list(self._open), lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Sends what is buffered."""
        self._each(list(self._open), lambda tracker: tracker.close())
        self._open = {}

    def _each(self, names: Sequence[str], action: Callable[[Tracker], None]) -> None:
        for name in names:
            try:
                action(self._open[name])
            except Exception as error:
                del self._open[name]
                say(f"--report-to {name}: it failed, and gets no more metrics: {error}")
