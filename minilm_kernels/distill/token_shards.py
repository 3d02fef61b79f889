"""Token shards: a tokenized text in a folder, of which a process reads the documents of its own samples only.

A shard is a safetensors file with the tokens of some megabytes of text, and the length and the content's hash of each
document. Beside the shards, two memory-mapped vectors of all documents tell where each begins and its hash, and the
manifest names every file with its size and SHA-256. Nothing in a folder is ever unpickled or run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .checkpoint import TEMPORARY, read_file, sha256, sync, write_error, write_file
from .tokenization import Tokens

EMPTY = "the training text is empty: no document in --text or --dataset-name has any tokens"
FORMAT = 1
MANIFEST = "manifest.json"
STARTS, DIGESTS = "starts.npy", "digests.npy"
_NAME = re.compile(r"shard-[0-9]{6,}\.safetensors")
_OPEN_SHARDS = 1024  # memory maps that a process keeps
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


def digest(text: str) -> bytes:
    """A hash of a document's content, which decides whether the document is used for training or evaluation."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Counts(NamedTuple):
    """Numbers of a shard or of a whole folder.

    Attributes:
        read: documents that were read, readable or not.
        good, bad, nulls: documents with text, bad ones, and those without text.
        lines: lines of the documents with text.
        documents, tokens: documents that have tokens, where a long one counts as several, and their tokens.
    """

    read: int = 0
    good: int = 0
    bad: int = 0
    nulls: int = 0
    lines: int = 0
    documents: int = 0
    tokens: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sums."""
        return Counts(*map(sum, zip(self, other, strict=True)))


class Shard(NamedTuple):
    """The description of a shard in its file.

    Attributes:
        begin, end: the positions in the text between which it was read, [index of the source, cursor].
    """

    begin: list[Any]
    end: list[Any]
    counts: Counts


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:06d}.safetensors"


def write_shard(path: Path, shard: Shard, tokens: Sequence[Tokens], digests: Sequence[bytes], dtype: str) -> None:
    """Writes a shard atomically. The same content gives the same bytes.

    Args:
        tokens, digests: the token ids and the hash of each document.
        dtype: numpy type of the token ids in the file.
    """
    arrays = {
        "tokens": np.concatenate([*tokens, np.empty(0, np.int32)]).astype(dtype),
        "lengths": np.array([len(each) for each in tokens], np.int32),
        "digests": np.frombuffer(b"".join(digests), ">u8").astype(np.uint64),
    }
    write_file(path, save(arrays, {"shard": json.dumps(shard)}))  # one key, because the order of several is random


def read_shard(path: Path) -> Shard:
    """The description of a shard in its file. Raises one of several errors if it is damaged."""
    with safe_open(path, "numpy") as file:
        begin, end, counts = json.loads(file.metadata()["shard"])
        return Shard(begin, end, Counts(*counts))


def write_manifest(folder: Path, plan: dict[str, Any], shards: int, hashes: list[str | None]) -> None:
    """Completes a folder: writes the vectors of all documents, and the manifest.

    Args:
        plan: the settings of the preparation, as JSON.
        shards: number of shards. Other files of shards are removed.
        hashes: SHA-256 of each file of the text; `None` for a data set.
    """
    names = [shard_name(number) for number in range(shards)]
    for stray in {path.name for path in folder.glob("shard-*")}.difference(names):
        (folder / stray).unlink()
    found = [read_shard(folder / name) for name in names]
    counts = Counts()
    for shard in found:
        counts = counts.plus(shard.counts)

    def starts() -> Iterator[np.ndarray]:
        yield np.zeros(1, np.int64)
        total = 0
        for name, shard in zip(names, found, strict=True):
            yield total + np.cumsum(_array(folder / name, "lengths"), dtype=np.int64)
            total += shard.counts.tokens

    _write_vector(folder / STARTS, "<i8", counts.documents + 1, starts())
    _write_vector(folder / DIGESTS, "<u8", counts.documents, (_array(folder / name, "digests") for name in names))
    files: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor() as threads:
        all_names = [STARTS, DIGESTS, *names]
        for name, content_hash in zip(all_names, threads.map(sha256, map(folder.joinpath, all_names)), strict=True):
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": content_hash}
    for name, shard in zip(names, found, strict=True):
        files[name]["tokens"] = shard.counts.tokens
    content = {"format": FORMAT, "plan": plan, "hashes": hashes, "counts": counts._asdict(), "files": files}
    write_file(folder / MANIFEST, json.dumps(content, indent=1).encode())


def _array(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(name)


def _write_vector(path: Path, dtype: str, size: int, parts: Iterable[np.ndarray]) -> None:
    """Writes a vector in numpy's format, part by part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": (size,)})
            for part in parts:
                file.write(part.astype(dtype).tobytes())
        sync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(error, path) from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder; `None` if there is none. Raises `ValueError` if it is damaged."""
    try:
        content = json.loads(read_file(folder / MANIFEST))
        if content["format"] != FORMAT:
            raise ValueError(f"{MANIFEST} has format {content['format']!r}, this version reads {FORMAT}")
        Counts(**content["counts"])
        names = content["files"].keys()
        if strange := [name for name in names if name not in (STARTS, DIGESTS) and not _NAME.fullmatch(name)]:
            raise ValueError(f"{MANIFEST} lists {strange[:3]}")
        return content
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        raise _damaged(folder, error) from error


class TokenShards:
    """A complete folder of token shards.

    Args:
        folder: the folder. Nothing is written into it.

    Attributes:
        plan: the settings of the preparation.
        counts: numbers of documents and tokens.
        starts: the place of each document's first token among all tokens, and the number of tokens, (documents + 1,)
            int64, memory-mapped.
        digests: the hash of each document's content, (documents,) uint64, memory-mapped.
        digest: SHA-256 that identifies all tokens and their tokenizer.
        tokens_read: number of tokens that `read` has returned.

    Raises:
        FileNotFoundError: the folder has no complete shards.
        ValueError: a file is missing or has another size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_manifest(folder)
        if content is None:
            raise FileNotFoundError(
                f"{folder} has no complete token shards ({MANIFEST}); minilm-distill prepare makes them. The folder "
                "must be on a disk that all processes share"
            )
        try:
            self.plan, self.counts, files = content["plan"], Counts(**content["counts"]), content["files"]
            self._files = files
            for name, expected in files.items():
                size = (folder / name).stat().st_size
                if size != expected["bytes"]:
                    raise ValueError(f"{name} has {size} bytes, expected {expected['bytes']}")
            self.starts = np.load(folder / STARTS, mmap_mode="r", allow_pickle=False)
            self.digests = np.load(folder / DIGESTS, mmap_mode="r", allow_pickle=False)
            documents = self.counts.documents
            if self.starts.shape != (documents + 1,) or self.digests.shape != (documents,):
                raise ValueError(f"{STARTS} and {DIGESTS} are not of {documents} documents")
            self._names = sorted(filter(_NAME.fullmatch, files), key=lambda name: (len(name), name))
            ends = np.cumsum([0, *(files[name]["tokens"] for name in self._names)])
            if ends[-1] != self.counts.tokens:
                raise ValueError(f"its shards have {ends[-1]} tokens, expected {self.counts.tokens}")
            self._firsts = ends[:-1]
            identity = [self.plan["tokenizer"], sorted((name, entry["sha256"]) for name, entry in files.items())]
        except _DAMAGE as error:
            raise _damaged(folder, error) from error
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.tokens_read = 0
        self._tokens: Callable[[int], Any] = lru_cache(_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self.digests)

    def verify(self) -> None:
        """Reads all files, at some 1 GB/s a core. Raises `ValueError` if one has another SHA-256."""

        def check(name: str) -> str:
            try:
                right = sha256(self.folder / name) == self._files[name]["sha256"]
            except OSError as error:
                return f"{name} cannot be read: {error}"
            return "" if right else f"{name} has a wrong checksum"

        with ThreadPoolExecutor() as threads:
            for problem in threads.map(check, self._files):
                if problem:
                    raise _damaged(self.folder, ValueError(problem))

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """The number of tokens of each of the documents."""
        return self.starts[documents + 1] - self.starts[documents]

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Tokens:
        """The tokens `start` to `stop` of a document, by default all of them."""
        first, end = (int(place) for place in self.starts[document : document + 2])
        end = end if stop is None else first + stop
        begin = first + start
        shard = int(np.searchsorted(self._firsts, begin, "right")) - 1
        offset = int(self._firsts[shard])
        self.tokens_read += end - begin
        return self._tokens(shard)[begin - offset : end - offset].astype(np.int32)

    def token_counts(self, documents: int) -> Counter[int]:
        """The number of occurrences of each token in the first documents."""
        counts: Counter[int] = Counter()
        for document in range(min(documents, len(self))):
            counts.update(self.read(document).tolist())
        return counts

    def _open(self, shard: int) -> Any:
        """The memory-mapped tokens of a shard."""
        name = self._names[shard]
        try:
            return safe_open(self.folder / name, "numpy").get_slice("tokens")
        except _DAMAGE as error:
            raise _damaged(self.folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
    return ValueError(f"the token shards in {folder} are damaged: {reason}; remove the folder and prepare them again")
