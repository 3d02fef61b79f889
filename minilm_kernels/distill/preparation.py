"""Turns text into token shards, in several processes. An interrupted preparation keeps its finished shards.

One process reads the text and deals documents out; the others tokenize them and write a shard each. A shard holds the
documents between two positions of the text, and its bytes depend on these alone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain, count, islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .bad_documents import BadDocuments
from .checkpoint import make_folder, read_file, remove_unfinished, sha256, write_error, write_file
from .config import DistillConfig
from .console import forgiving_streams, say
from .distributed import end_with_parent
from .loading import load_tokenizer, resolve_source
from .run_folder import lock_folder
from .sources import Document, HubDataset, Source, open_sources
from .token_shards import (
    DIGESTS,
    EMPTY,
    MANIFEST,
    STARTS,
    Counts,
    Shard,
    TokenShards,
    digest,
    read_manifest,
    read_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from .tokenization import DocumentTokenizer, Tokens, check_tokenizer

PLAN = "plan.json"
ROUND_SECONDS = 60.0  # far below the time after which waiting processes give up
QUIET_SECONDS = 5.0  # shorter preparations print nothing
SHARD_CHARACTERS = 8 << 20  # text of a shard
SHARD_DOCUMENTS = 1 << 18
READ_DOCUMENTS = 256  # largest number of documents to tokenize at once
READ_CHARACTERS = 1 << 18  # largest number of characters to tokenize at once


class _Task(NamedTuple):
    """A shard to be made, or to be read if it is finished (`documents` is then None)."""

    path: Path
    begin: list[Any]
    end: list[Any]
    documents: list[tuple[str, str]] | None = None  # text and place of each document with text
    bad: Sequence[Document] = ()
    nulls: int = 0
    dtype: str = ""


class TokenFolder:
    """A folder of token shards that is made from a text.

    Args:
        folder: the folder.
        sources: the text.
        tokenizer: the tokenizer.
        settings: further settings on which the documents depend, by option.
        most_documents: number of documents of the text to use; `None` for all.
        option: the option that names the folder, for messages.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sequence[Source],
        tokenizer: DocumentTokenizer,
        settings: dict[str, Any],
        most_documents: int | None = None,
        option: str = "--output-dir",
    ) -> None:
        self.folder, self._sources, self._tokenizer, self._option = folder, sources, tokenizer, option
        self._most = most_documents
        self.plan: dict[str, Any] = {
            "tokenizer": tokenizer.digest(),
            "dtype": "uint16" if tokenizer.largest_id < 1 << 16 else "uint32",
            "settings": {**settings, "--max-train-documents": most_documents},
            "text": [{"name": source.name, **source.fingerprint()} for source in sources],
        }

    def difference(self, strict: bool = False) -> str | None:
        """Describes how text, tokenizer or settings differ from those of the complete folder; "" if they are the same.

        Returns `None` if the folder is not complete. With `strict`, it is not if bad documents were skipped.

        Raises:
            ValueError: the manifest is damaged.
        """
        content = read_manifest(self.folder)
        if content is None or (strict and content["counts"]["bad"]):
            return None
        return self._difference(content["plan"], content["hashes"])

    def _difference(self, before: dict[str, Any], hashes: list[str | None]) -> str:
        if before["tokenizer"] != self.plan["tokenizer"]:
            return "another tokenizer"
        for name, now in self.plan["settings"].items():
            if before["settings"].get(name) != now:
                return f"{name}: {before['settings'].get(name)} before, {now} now"
        names = [source.name for source in self._sources]
        if difference := _listed_difference([entry["name"] for entry in before["text"]], names):
            return difference
        for source, old, new, content in zip(self._sources, before["text"], self.plan["text"], hashes, strict=True):
            # The date of a copied file differs, and its content tells whether it is the same.
            same_size = old.get("bytes") == new.get("bytes")
            if old != new and not (same_size and source.path is not None and sha256(source.path) == content):
                return f"{source.name} differs"
        return ""

    def prepare(self, bad_documents: BadDocuments, processes: int = 1) -> Iterator[Counts]:
        """Makes the shards that are missing, and yields the counts after each shard.

        A folder of another text or tokenizer is made anew.

        Raises:
            ValueError: a bad document is an error, nearly all documents are bad, the text changes meanwhile, or the
                folder has other files.
            RuntimeError: another process prepares or reads the folder, or a process of this preparation was killed.
            OSError: the disk is full or cannot be written.
        """
        with ExitStack() as stack:
            try:
                make_folder(self.folder)
                stack.enter_context(lock_folder(self.folder, self._option))
            except OSError as error:
                raise write_error(error, self.folder) from error
            self._begin()
            counts = Counts()
            shards = 0
            results = stack.enter_context(closing(self._results(self._tasks(bad_documents.strict), processes)))
            for shard, bad in results:
                bad_documents.note(shard.counts.good, bad, shard.counts.nulls)
                counts, shards = counts.plus(shard.counts), shards + 1
                yield counts
            bad_documents.end_text()
            if not counts.documents:
                raise ValueError(f"{EMPTY}{bad_documents.listed()}")
            hashes = [None if source.path is None else sha256(source.path) for source in self._sources]
            now = [{"name": source.name, **source.fingerprint()} for source in self._sources]
            if now != self.plan["text"]:
                raise ValueError(
                    "the text has changed while it was read: "
                    f"{', '.join(new['name'] for new, old in zip(now, self.plan['text'], strict=True) if new != old)}"
                )
            write_manifest(self.folder, self.plan, shards, hashes)

    def _begin(self) -> None:
        """Removes unfinished files, and the shards of another preparation."""
        remove_unfinished(self.folder)
        names = {path.name for path in self.folder.iterdir()} - {".lock"}
        own = {name for name in names if name in (PLAN, MANIFEST, STARTS, DIGESTS) or name.startswith("shard-")}
        if names != own:
            raise ValueError(
                f"{self._option}: {self.folder} has other files ({', '.join(sorted(names - own)[:5])}); choose an "
                "empty folder"
            )
        try:
            same = json.loads(read_file(self.folder / PLAN)) == json.loads(json.dumps(self.plan))
        except (OSError, ValueError):
            same = False
        for name in sorted(names) if not same else {MANIFEST} & names:  # the manifest first
            (self.folder / name).unlink()
        if not same:
            write_file(self.folder / PLAN, json.dumps(self.plan, indent=1).encode())

    def _tasks(self, strict: bool) -> Iterator[_Task]:
        """Yields the shards in the order of the text. The text of finished ones is not read."""
        place: list[Any] = [0, None]
        read = 0
        documents = self._documents(place)
        for number in count():
            path = self.folder / shard_name(number)
            finished = _finished(path, place, strict)
            if finished is None:
                most = SHARD_DOCUMENTS if self._most is None else min(SHARD_DOCUMENTS, self._most - read)
                task, dealt = self._deal(path, place, islice(documents, most))
                if not dealt:
                    return
                read += dealt
            else:
                task = _Task(path, place, finished.end)
                read += finished.counts.read
                documents = self._documents(finished.end)
            yield task
            place = task.end

    def _documents(self, place: list[Any]) -> Iterator[tuple[Document, list[Any]]]:
        """Yields the documents after a place, and the place after each."""
        first, cursor = place
        for index in range(first, len(self._sources)):
            for document in self._sources[index].read(cursor):
                yield document, [index, document.cursor]
            cursor = None

    def _deal(self, path: Path, place: list[Any], documents: Iterator[tuple[Document, list[Any]]]) -> tuple[_Task, int]:
        """The next shard, and the number of its documents, readable or not."""
        texts: list[tuple[str, str]] = []
        bad: list[Document] = []
        size = nulls = 0
        end = place
        for document, after in documents:
            end = after
            if document.text is not None:
                texts.append((document.text, document.where))
                size += len(document.text)
            elif document.problem:
                bad.append(document)
            else:
                nulls += 1
            if size >= SHARD_CHARACTERS:
                break
        return _Task(path, place, end, texts, bad, nulls, self.plan["dtype"]), len(texts) + len(bad) + nulls

    def _results(self, tasks: Iterator[_Task], processes: int) -> Generator[tuple[Shard, list[Document]], None, None]:
        """The shards of all tasks, and their bad documents, in order. A text of one shard needs no other process."""
        first = list(islice(tasks, 2))
        if len(first) < 2 or processes == 1 or "fork" not in get_all_start_methods():
            for task in chain(first, tasks):
                yield _run(task, self._tokenizer)
            return
        # Forked processes have the tokenizer, of whatever kind, and its memory in common with this one. Unlike spawned
        # ones, they do not run the main script again.
        pool = ProcessPoolExecutor(processes, get_context("fork"), _begin_process, (self._tokenizer, os.getpid()))
        try:
            waiting: deque[Future[tuple[Shard, list[Document]]]] = deque()
            for task in chain(first, tasks):
                waiting.append(pool.submit(_run_in_process, task))
                if len(waiting) > processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that tokenizes text was killed, perhaps for want of memory; finished shards are kept: start "
                "again, with a lower --preprocessing-num-workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def prepare(config: DistillConfig) -> TokenShards:
    """Tokenizes the text of a run once, for any number of runs with the same tokenizer (`config.tokens`).

    The text is divided into shards, which several processes tokenize. An interrupted preparation keeps its finished
    shards, and the same call continues it.

    Args:
        config: the settings of which those of the text are used, the tokenizer of `teacher`, and `output_dir` as the
            folder of the tokens.

    Returns:
        The tokens. `counts` has the numbers of documents and tokens.

    Raises:
        FileNotFoundError, ValueError: the tokenizer or the text cannot be used, or the folder has other files.
        RuntimeError: another process prepares the folder, or a process was killed.
        OSError: the disk is full or cannot be written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from minilm_kernels.distill import DistillConfig, prepare
        >>> folder = Path(tempfile.mkdtemp())
        >>> tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        >>> _ = tokenizer.save_pretrained(folder / "teacher")
        >>> _ = (folder / "text.txt").write_text("a b\\n\\nb a b")
        >>> config = DistillConfig(
        ...     teacher=folder / "teacher", copy_layers=(1,), text=[folder / "text.txt"], output_dir=folder / "tokens"
        ... )
        >>> shards = prepare(config)
        >>> len(shards), shards.counts.tokens, shards.read(1).tolist()
        (2, 5, [3, 2, 3])
    """
    if config.tokens is not None:
        raise ValueError("--tokens: minilm-distill prepare takes --text or --dataset-name")
    with forgiving_streams():
        folder = Path(config.output_dir)
        sources, _ = open_text(replace(config, eval_text=()), say)
        tokenizer = DocumentTokenizer(load_tokenizer(resolve_source(config.teacher, "--teacher"), "--teacher"))
        check_tokenizer(tokenizer, document_texts(sources))

        def differs(difference: str) -> None:
            raise ValueError(
                f"--output-dir: {folder} has the tokens of another text, or of another tokenizer ({difference}); "
                "choose another folder"
            )

        for _ in prepare_text(config, folder, sources, tokenizer, BadDocuments(config.bad_documents, say), differs):
            pass
        return TokenShards(folder)


def open_text(config: DistillConfig, say: Callable[[str], None]) -> tuple[list[Source], list[Source]]:
    """Opens the training text and the separate evaluation text, if there is one."""

    def files(paths: tuple[str, ...], option: str) -> list[Source]:
        by_line = config.documents == "line"
        return open_sources(paths, text_column=config.text_column, by_line=by_line, option=option, say=say)

    training: list[Source] = files(config.text, "--text")
    if config.dataset_name is not None:
        name, subset = config.dataset_name, config.dataset_config_name
        training = [HubDataset(name, subset, config.dataset_split, config.text_column)]
    return training, files(config.eval_text, "--eval-text")


def document_texts(sources: Iterable[Source]) -> Iterator[str]:
    """The text of all documents that have one."""
    documents = (document for source in sources for document in source.read())
    return (document.text for document in documents if document.text is not None)


def prepare_text(
    config: DistillConfig,
    folder: Path,
    sources: Sequence[Source],
    tokenizer: DocumentTokenizer,
    bad_documents: BadDocuments,
    on_difference: Callable[[str], None],
) -> Generator[bool, None, None]:
    """Makes the shards of a run's text that are missing, with a progress display.

    Args:
        folder: the folder of the shards.
        on_difference: is called if the folder is complete, but of another text, tokenizer or settings, with a
            description. If it returns, the folder is made anew.

    Yields:
        False from time to time, and True at the end.

    Raises:
        ValueError, RuntimeError, OSError: as `TokenFolder.prepare`.
    """
    settings = {"--text-column": config.text_column, "--documents": config.documents}
    target = TokenFolder(folder, sources, tokenizer, settings, config.max_train_documents)
    yield from _prepared(target, bad_documents, config.preprocessing_num_workers, on_difference)


def _prepared(
    target: TokenFolder, bad_documents: BadDocuments, processes: int | None, on_difference: Callable[[str], None]
) -> Iterator[bool]:
    """`prepare_text` for a folder."""
    difference = target.difference(bad_documents.strict)
    if difference:
        on_difference(difference)
    if difference != "":
        counts, began = Counts(), time.monotonic()
        latest = began
        with tqdm(desc="preparing text", unit=" tokens", unit_scale=True, disable=None) as bar:
            for counts in target.prepare(bad_documents, processes or available_processors()):
                bar.update(counts.tokens - bar.n)
                bar.set_postfix_str(f"{counts.documents} documents")
                if time.monotonic() - latest > ROUND_SECONDS:
                    latest = time.monotonic()
                    if bar.disable:
                        say(f"preparing text: {counts.documents} documents, {counts.tokens} tokens")
                    yield False
        seconds = time.monotonic() - began
        if seconds > QUIET_SECONDS:
            say(f"{target.folder} has {counts.documents} documents, {counts.tokens} tokens, after {seconds:.0f} s")
    yield True


def available_processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _listed_difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Describes how the list of sources has changed; "" if it has not."""
    gone, new = ([name for name in a if name not in b] for a, b in ((before, now), (now, before)))
    parts = [f"{word} {', '.join(names[:5])}" for word, names in (("missing:", gone), ("new:", new)) if names]
    return ", ".join(parts) or ("" if before == now else "its files have another order or number")


def _finished(path: Path, place: list[Any], strict: bool) -> Shard | None:
    """The description of a finished shard that begins at this place, unless `strict` and it lacks bad documents."""
    try:
        shard = read_shard(path)
    except Exception:  # it does not exist, or is damaged and made again
        return None
    return shard if shard.begin == place and not (strict and shard.counts.bad) else None


_inherited: DocumentTokenizer | None = None  # the tokenizer of a forked process


def _begin_process(tokenizer: DocumentTokenizer, parent: int) -> None:
    """Prepares a forked process, which ends when its parent is killed and leaves Ctrl-C to it."""
    global _inherited
    _inherited = tokenizer
    gc.freeze()  # a collection would write to, and so copy, all memory in common
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one thread


def _run_in_process(task: _Task) -> tuple[Shard, list[Document]]:
    assert _inherited is not None
    return _run(task, _inherited)


def _run(task: _Task, tokenizer: DocumentTokenizer) -> tuple[Shard, list[Document]]:
    """Makes a shard. Returns it and its bad documents."""
    if task.documents is None:
        shard = read_shard(task.path)
        bad = shard.counts.bad
        named = [Document(None, str(task.path), None, f"{bad} bad documents, skipped before", bad)] if bad else []
        return shard, named
    tokens: list[Tokens] = []
    digests: list[bytes] = []
    refused: list[Document] = []
    lines = 0
    for group in _groups(task.documents):
        found, bad_documents = tokenizer.documents([Document(text, where, None) for text, where in group])
        refused += bad_documents
        for (text, _), parts in zip(group, found, strict=True):
            if any(map(len, parts)):
                lines += len(text.strip().splitlines())
                whole = [part for part in parts if len(part)]
                tokens += whole
                digests += [digest(text)] * len(whole)
    bad_documents = [*task.bad, *refused]
    good = len(task.documents) - len(refused)
    counts = Counts(
        read=len(task.documents) + len(task.bad) + task.nulls,
        good=good,
        bad=sum(document.documents for document in bad_documents),
        nulls=task.nulls,
        lines=lines,
        documents=len(tokens),
        tokens=sum(map(len, tokens)),
    )
    shard = Shard(task.begin, task.end, counts)
    write_shard(task.path, shard, tokens, digests, task.dtype)
    return shard, bad_documents


def _groups(documents: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    """Documents that are tokenized together."""
    begin = size = 0
    for end, (text, _) in enumerate(documents, 1):
        size += len(text)
        if end - begin == READ_DOCUMENTS or size >= READ_CHARACTERS or end == len(documents):
            yield documents[begin:end]
            begin, size = end, 0
