"""What a measurement is: one JSON line with these keys, whatever the suite, so that rows of any date compare."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

import minilm_kernels

Row = dict[str, Any]
_RUN = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}-{os.getpid()}"  # rows with one of these were measured together

STATUSES = {
    "ok": "measured",
    "oom": "out of memory, or beyond the memory allowed",
    "slow": "beyond the time allowed, by a first run or an estimate from fewer sequences",
    "unsupported": "the provider cannot compute this",
    "wrong": "too far from float64: no speed is reported",
    "failed": "an error that is none of these",
}
KEYS = (
    *("suite", "provider", "device", "dtype", "mode", "shape", "median_ms", "p20_ms", "p80_ms", "runs", "method"),
    *("peak_bytes", "saved_bytes", "error_value", "error_grad", "pairs", "exponentials", "status", "reason"),
    *("detail", "clocks", "versions", "revision", "run"),
)


def new(suite: str, provider: str, device: str, dtype: str, mode: str, shape: dict, **measured: Any) -> Row:
    """A row with all keys; those without a measurement are None. `detail` holds what a suite has beyond them."""
    given = {"suite": suite, "provider": provider, "dtype": dtype, "mode": mode, "shape": shape}
    given |= {"device": device_name(device), "versions": versions(device), "revision": revision(), "run": _RUN}
    given["detail"] = {}
    unknown = set(measured) - set(KEYS)
    if unknown:
        raise ValueError(f"measured: expected keys of a row, got {', '.join(sorted(unknown))}")
    return dict.fromkeys(KEYS) | given | measured


def read(paths: Iterable[Path]) -> list[Row]:
    """Rows of JSON lines files, and of all such files in folders. Raises ValueError that names a line which is none.

    In a folder, files that hold something else are left out.
    """
    rows = []
    for path in paths:
        if not path.is_dir():
            rows += _read(path)
            continue
        for file in sorted(path.glob("*.jsonl")):
            with suppress(_OtherLines):
                rows += _read(file)
    return rows


class _OtherLines(ValueError):
    """JSON, but no row."""


def _read(file: Path) -> list[Row]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            missing = {"suite", "provider", "status", "shape"} - set(row)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: expected a JSON object, got {line[:60]!r}") from error
        if missing:
            raise _OtherLines(f"{file}, line {number}: expected a row, it lacks {', '.join(sorted(missing))}")
        found.append(dict.fromkeys(KEYS) | row | {"detail": row.get("detail") or {}})
    return found


def append(file: Path, row: Row) -> None:
    """One line at the end of `file`, on the disk before this returns: what was measured survives a kill."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())


def name(row: Row) -> str:
    """What was measured, in one line for the eye."""
    shape = row["shape"]
    sizes = f"B={shape['B']} A={shape['A']} S={shape['S']} {shape['d_t']}/{shape['d_s']}"
    words = (row["suite"], row["detail"].get("model"), row["provider"], row["dtype"], sizes, shape["relations"])
    return " ".join(word for word in (*words, shape["mask"], row["mode"], row["method"]) if word)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {_processor()}, {torch.get_num_threads()} threads"


def _cpuinfo(name: str) -> list[str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    return re.findall(rf"^{name}\s*: (.*)$", text, re.MULTILINE)


@cache
def _processor() -> str:
    return next(iter(_cpuinfo("model name")), platform.processor())


def clocks(device: str) -> dict[str, float] | None:
    """Frequencies in MHz right now; of a CPU also the load, which says whether others were at work."""
    if device == "cuda":
        names = ["clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"]
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
            return dict(zip(names, map(float, answer.splitlines()[0].split(",")), strict=True))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None
    frequencies = [float(x) for x in _cpuinfo("cpu MHz")]
    mean = {"mhz": round(sum(frequencies) / len(frequencies))} if frequencies else {}
    return mean | {"load": os.getloadavg()[0]}


@cache
def versions(device: str) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minilm_kernels": minilm_kernels.__version__,
    }
    if device == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda or "none"}
    return found


@cache
def revision() -> str:
    command = ["git", "-C", str(Path(minilm_kernels.__file__).parent), "describe", "--always", "--dirty"]
    return os.environ.get("MINILM_KERNELS_REVISION") or (
        subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    )
