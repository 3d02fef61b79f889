"""Speeds of the parts of the input pipeline: the tokenizer, the preparation of token shards, and reading from them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilm_kernels.distill.packing import PADDING, Packer
from minilm_kernels.distill.sample_stream import Place, SampleStream
from minilm_kernels.distill.sources import open_sources
from minilm_kernels.distill.token_shards import TokenShards
from minilm_kernels.distill.tokenization import DocumentTokenizer

_TOKENIZED = 1000  # documents of a call of the tokenizer
_MEMORY_SECONDS = 0.1  # between two looks at the memory of a process
# The program has no other imports, which would count as its memory. It prints seconds, seconds of all processors and
# tokens.
_PREPARE = """
import json, resource, sys, time
from minilm_kernels.distill import DistillConfig, prepare

def processor():
    found = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in found)

config = DistillConfig(**json.loads(sys.argv[1]))
begin = time.perf_counter(), processor()
tokens = prepare(config).counts.tokens
print(json.dumps([time.perf_counter() - begin[0], processor() - begin[1], tokens]))
"""


def _texts(file: Path) -> Iterator[str]:
    (source,) = open_sources([str(file)])
    return (document.text or "" for document in source.read())


class Speed(NamedTuple):
    """Seconds by wall clock and of all processors, for a number of tokens."""

    seconds: float
    processor: float
    tokens: int


def tokenizer_speed(tokenizer: Any, file: Path, seconds: float) -> Speed:
    """The tokenizer alone, on all processors, on the first part of the text."""
    spent, processor, tokens = 0.0, 0.0, 0
    documents = _texts(file)
    while spent < seconds and (part := list(islice(documents, _TOKENIZED))):
        start = time.perf_counter(), time.process_time()
        encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
        spent += time.perf_counter() - start[0]
        processor += time.process_time() - start[1]
        tokens += sum(map(len, encoded["input_ids"]))
    return Speed(spent, processor, tokens)


def preparation(settings: dict[str, Any]) -> tuple[Speed, int]:
    """Prepares the tokens of a text in a new process, and returns the most memory of it and its children, in bytes.

    Memory that n processes share counts as 1/n in each (the proportional set size of Linux).

    Args:
        settings: arguments of `DistillConfig`.
    """
    command = [sys.executable, "-c", _PREPARE, json.dumps(settings)]
    peak = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, tempfile.TemporaryFile("w+") as out:  # not full pipes
        with subprocess.Popen(command, stdout=out, stderr=said) as process:
            while process.poll() is None:
                peak = max(peak, tree_bytes(process.pid))
                time.sleep(_MEMORY_SECONDS)
        for file in (said, out):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"the preparation ended with {process.returncode}: {said.read().strip()[-300:]}")
        return Speed(*json.loads(out.read().splitlines()[-1])), peak


def tree_bytes(pid: int) -> int:
    """Bytes of memory of a process and its descendants; 0 for processes that have ended, and without Linux's /proc."""
    total = 0
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_bytes(int(child)) for child in (task / "children").read_text(encoding="ascii").split())
    except OSError:
        pass
    return total


def wrong_tokens(shards: TokenShards, tokenizer: DocumentTokenizer, file: Path, count: int) -> float:
    """The share of the first documents whose stored tokens are not the tokenizer's."""
    expected = [tokenizer(text) for text in islice(_texts(file), count)]
    return float(np.mean([not np.array_equal(shards.read(n), tokens) for n, tokens in enumerate(expected)]))


def reading_speed(shards: TokenShards, tokenizer: DocumentTokenizer, length: int, count: int) -> Speed:
    """Taking samples of `length` tokens, after the order of the epoch is made."""
    stream = SampleStream(shards, Packer(tokenizer, length, True), eval_set=None, seed=0)
    stream.take(1)
    stream.place = Place()
    begin = time.perf_counter(), time.process_time()
    tokens = sum(int((stream.take(1).positions != PADDING).sum()) for _ in range(count))
    return Speed(time.perf_counter() - begin[0], time.process_time() - begin[1], tokens)
