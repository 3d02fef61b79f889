"""Records: one JSON line per measurement, with the same keys in every suite, so that all records can be compared."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

import minilm_kernels

from .workload import Workload

Record = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results"

STATUSES = ("ok", "oom", "slow", "unsupported", "wrong", "failed")
KEYS = (
    *("suite", "provider", "device", "dtype", "mode", "shape", "median_ms", "p20_ms", "p80_ms", "runs", "method"),
    *("peak_bytes", "saved_bytes", "error_value", "error_grad", "pairs", "exponentials", "status", "reason"),
    *("detail", "clocks", "versions", "revision", "run"),
)
# Shared by the records that one process measures.
_RUN = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}-{os.getpid()}"


def new(suite: str, provider: str, workload: Workload, mode: str = "full", **measured: Any) -> Record:
    """A record with all keys. Values that are not measured are None; `detail` holds values of this suite only."""
    unknown = set(measured) - set(KEYS)
    if unknown:
        raise ValueError(f"measured: expected keys of a record, got {', '.join(sorted(unknown))}")
    device = workload.device
    return dict.fromkeys(KEYS) | {
        **{"suite": suite, "provider": provider, "device": device_name(device), "dtype": workload.dtype, "mode": mode},
        **{"shape": workload.shape(), "detail": {}, "versions": versions(device), "revision": revision(), "run": _RUN},
        **measured,
    }


def read(paths: Iterable[Path]) -> list[Record]:
    """The records of JSON lines files and of folders of such files. A ValueError names a line that is not a record."""
    found = []
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                found.append(_parsed(line, f"{file}, line {number}"))
    return found


def _parsed(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
        missing = {"suite", "provider", "status", "shape"} - set(record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: expected a JSON object, got {line[:60]!r}") from error
    if missing:
        raise ValueError(f"{place}: expected a record, it lacks {', '.join(sorted(missing))}")
    return dict.fromkeys(KEYS) | record | {"detail": record.get("detail") or {}}


def append(file: Path, record: Record) -> None:
    """Write one line and wait until it is on the disk, so that a killed run keeps its records."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
        out.flush()
        os.fsync(out.fileno())


def describe(record: Record) -> str:
    """A measurement in one line, without its result."""
    shape = record["shape"]
    sizes = f"B={shape['B']} A={shape['A']} S={shape['S']} {shape['d_t']}/{shape['d_s']}"
    names = (record["detail"].get(key) for key in ("model", "layout"))
    words = (record["suite"], *names, _provider(record), record["dtype"], sizes)
    return " ".join(w for w in (*words, shape["relations"], shape["mask"], record["mode"], record["method"]) if w)


def _provider(record: Record) -> str:
    return record["detail"].get("variant") or record["provider"]


def summarize(record: Record) -> str:
    """A measurement and its result, in one line."""
    detail, pairs = record["detail"], record["pairs"]
    per_pair = record["median_ms"] and pairs and 1e6 * record["median_ms"] / pairs
    values = {
        "{:.4g} ms": record["median_ms"],
        "{:.3g} ns/pair": per_pair,
        "peak {:.1f} MiB": record["peak_bytes"] and record["peak_bytes"] / 2**20,
        "saved {:.1f} MiB": record["saved_bytes"] and record["saved_bytes"] / 2**20,
        "loss error {:.1e}": record["error_value"],
        "grad error {:.1e}": record["error_grad"],
        "best {:.4g} ms": detail.get("best_ms"),
        "processor {:.4g} ms": detail.get("processor_ms"),
        "{:.4g} tokens/s": detail.get("tokens_per_s"),
        "loss share {:.0%}": detail.get("loss_share"),
        "MFU {:.0%}": detail.get("mfu"),
        "recipe {:.3g} h": detail.get("recipe_hours"),
        "first call {:.3g} s": detail.get("first_call_s"),
        "cache {}": detail.get("cache"),
        "{} runs of equal bits": detail.get("repeated"),
        "largest batch in {:g} GiB": "budget_bytes" in detail and detail["budget_bytes"] / 2**30,
    }
    parts = [template.format(value) for template, value in values.items() if value]
    result = ", ".join(parts) if record["status"] == "ok" else f"{record['status']} {record['reason'] or ''}"
    return f"{describe(record)}: {result}"


def measured_alone(record: Record) -> bool:
    """False if other processes competed for the CPU: the load is above the number of threads of the measurement."""
    load = (record["clocks"] or {}).get("load")
    return load is None or load <= int(record["device"].rsplit(", ", 1)[1].split()[0]) + 0.5


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
    """Current frequencies in MHz; for a CPU also the load average, which shows disturbances."""
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
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["minilm_kernels"] = minilm_kernels.__version__
    if device == "cuda":
        import triton

        found |= {"triton": triton.__version__, "cuda": torch.version.cuda or "none"}
    return found


@cache
def revision() -> str:
    """$MINILM_KERNELS_REVISION, the git revision, or without git a digest of the sources."""
    package = Path(minilm_kernels.__file__).parent
    command = ["git", "-C", str(package), "describe", "--always", "--dirty"]
    if given := os.environ.get("MINILM_KERNELS_REVISION"):
        return given
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or f"sources-{_digest(package.parent)}"


def _digest(root: Path) -> str:
    files = sorted(file for name in ("minilm_kernels", "csrc", "benchmarks") for file in (root / name).rglob("*.*"))
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".py", ".toml", ".cpp", ".h", ".inl", ".cuh"):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]
