"""The environment on which the exact results of a run depend. Checkpoints record it, and resumed runs compare it."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers.utils.hub import cached_file

import minilm_kernels
from minilm_kernels.relation.backends import native

from .checkpoint import sha256
from .models import TeacherStudent

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def conditions(device: torch.device) -> dict[str, Any]:
    """Machine and versions as JSON. The keys appear in messages."""
    backends = [name for name, reason in minilm_kernels.backend_status().items() if reason == "ready"]
    instructions = torch.backends.cpu.get_cpu_capability()
    if "cpu" in backends:
        instructions += f", kernels {native.cpu.instruction_set()}"
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "minilm_kernels": minilm_kernels.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "instruction set": instructions,
        "backends": ", ".join(backends),
    }


def condition_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a warning for each condition that has changed."""
    return [
        f"results may differ in their last bits from an uninterrupted run: {name} was {before.get(name)}, "
        f"is {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def teacher_digests(models: TeacherStudent) -> dict[str, str]:
    """SHA-256 of the files of the teacher and its tokenizer, by name."""
    name = models.teacher.model.name_or_path
    revision = getattr(models.teacher.model.config, "_commit_hash", None)
    names = {"config.json", _WEIGHTS, *_TOKENIZER, "tokenizer.json", *models.tokenizer.vocab_files_names.values()}
    files = {file: _find(name, file, revision) for file in sorted(names)}
    if files[_WEIGHTS] is None and (index := _find(name, _INDEX, revision)) is not None:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files |= {_INDEX: index, **{shard: _find(name, shard, revision) for shard in sorted(shards)}}
    return {file: sha256(path) for file, path in files.items() if path is not None}


def _find(name: str, file: str, revision: str | None) -> Path | None:
    """The path of a file of the model: in its local folder, or in the hub's cache once the model has been loaded."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.exists() else None
    found = cached_file(
        name,
        file,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def _processor() -> str:
    """Model name of the CPU, because libraries choose their code by it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
