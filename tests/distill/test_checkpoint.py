"""Checkpoints with full disks, kills and damage."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minilm_kernels.distill import checkpoint as module
from minilm_kernels.distill.checkpoint import (
    TEMPORARY,
    Checkpoint,
    Checkpoints,
    read_checkpoint,
    remove_unfinished,
    write_file,
    write_folder,
)


def make(step: int, size: int = 1000) -> Checkpoint:
    shared = torch.full((size,), float(step))
    tensors = {
        "model": {"a": shared, "tied": shared, "turned": torch.arange(6.0).view(2, 3).T, "part": shared[3:5]},
        "progress": {"rng": torch.arange(5, dtype=torch.uint8), "empty": torch.empty(0, 4)},
    }
    return Checkpoint(step, {"data": {"cursor": [0, [12, 3]], "note": "größe"}}, tensors)


def check(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    expected = make(step)
    assert (found.step, found.state) == (step, expected.state)
    for name, tensors in expected.tensors.items():
        assert found.tensors[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found.tensors[name][key], tensor)
            assert found.tensors[name][key].dtype == tensor.dtype


def test_what_was_written_is_read_and_the_oldest_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None
    for step in (5, 10, 100):
        checkpoints.write(make(step))
    assert [path.name for path in checkpoints.names()] == ["step-000000010", "step-000000100"]
    check(checkpoints.newest(), 100)
    assert {path.suffix for path in checkpoints.names()[0].iterdir()} == {".safetensors", ".json"}


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Killed(BaseException):
    """Simulates a kill: no later code runs, and no handler of `Exception` catches it."""


@contextmanager
def failing(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Makes the `count`-th file operation fail (half-way for tensors). Yields the operations so far."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def action(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == count:
                if name == "_write":
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                if name == "rmtree":
                    next(args[0].iterdir()).unlink()
                raise error
            return real(*args, **kwargs)

        patch.setattr(owner, name, action)

    with monkeypatch.context() as patch:
        wrap(module, "_write")
        for name in ("rename", "replace", "mkdir"):
            wrap(Path, name)
        wrap(os, "fsync")
        wrap(module.shutil, "rmtree")
        yield seen


def actions(write: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with failing(0, Killed(), monkeypatch) as seen:
        write()
    return list(seen)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # would be called hundreds of times
    folder = tmp_path / "count"
    Checkpoints(folder, 1).write(make(1))
    moments = actions(lambda: Checkpoints(folder, 1).write(make(2)), monkeypatch)
    assert {"_write", "fsync", "rename", "rmtree"} <= set(moments)
    outcomes = set()
    for moment in range(1, len(moments) + 1 + 2 * damaged):
        folder = tmp_path / str(moment)
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.write(make(1))
        if damaged:  # a damaged folder has the name of the checkpoint to write
            (folder / "step-000000002").mkdir()
            (folder / "step-000000002" / "rest").touch()
        with failing(moment, Killed(), monkeypatch), suppress(Killed):
            checkpoints.write(make(2))
        found = checkpoints.newest()
        assert found is not None
        check(found, found.step)
        outcomes.add(found.step)
        for path in folder.glob("step-*"):  # only the damaged checkpoint may be incomplete
            if not (damaged and (path / "rest").exists()):
                check(read_checkpoint(path), int(path.name[5:]))
        checkpoints.rotate()  # as at the start of a run
        assert [path.name for path in checkpoints.names()] == [f"step-{found.step:09d}"]
        checkpoints.write(make(3))
        kept = {"step-000000003", *(["damaged-step-000000002"] if damaged else [])}
        assert {path.name for path in folder.iterdir()} <= kept
    assert outcomes == {1, 2}


def test_a_failure_of_any_write_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # would be called hundreds of times
    folder = tmp_path / "count"
    Checkpoints(folder, 1).write(make(1))
    moments = actions(lambda: Checkpoints(folder, 1).write(make(2)), monkeypatch)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = moments.index("rename") + 1
    for moment in range(1, last + 1):
        checkpoints = Checkpoints(tmp_path / str(moment), keep=1)
        checkpoints.write(make(1))
        with (
            failing(moment, full, monkeypatch),
            pytest.raises(OSError, match=r"disk is full.*make room.*--resume-from-checkpoint") as caught,
        ):
            checkpoints.write(make(2))
        assert caught.value.errno == errno.ENOSPC
        check(checkpoints.newest(), 1)
        assert not list(checkpoints.folder.glob(f"{TEMPORARY}*"))  # the space of the temporary folder is free again


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limits the size of files by the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 3000, 30_000])
def test_what_the_system_refuses_to_write_is_explained(size: int, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.write(make(1))
    with file_size_limit(size), pytest.raises(OSError, match="disk is full"):
        checkpoints.write(make(2, size=10_000))
    check(checkpoints.newest(), 1)
    assert not list(checkpoints.folder.glob(f"{TEMPORARY}*"))

    file = tmp_path / "small.json"
    write_file(file, b"before")
    with file_size_limit(size), pytest.raises(OSError, match="disk is full"):
        write_file(file, b"x" * (size + 1))
    assert file.read_text() == "before"
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def into(file: Path, make: Callable[[Path], Any]) -> None:
    file.unlink()
    make(file)


def manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content["files"])
    (folder / "manifest.json").write_text(json.dumps(content))


def replace(folder: Path, name: str, content: bytes) -> None:
    """Replaces the content of a file and adapts the manifest."""
    (folder / name).write_bytes(content)
    listed = {"bytes": len(content), "sha256": module.sha256(folder / name)}
    manifest(folder, lambda files: files.update({name: listed}))


def state(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "state.json").read_text())
    replace(folder, "state.json", json.dumps({**content, **changes}).encode())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (flip_a_bit, "model.safetensors has a wrong checksum"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 50), "model.safetensors has 50 bytes, expected"),
    "gone": (lambda folder: (folder / "progress.safetensors").unlink(), "progress.safetensors"),
    "folder": (lambda folder: into(folder / "state.json", lambda file: file.mkdir()), "Is a directory"),
    "pipe": (lambda folder: into(folder / "state.json", os.mkfifo), "state.json is not a regular file"),
    "binary manifest": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "is damaged: 'utf-8' codec"),
    "other manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), "is damaged: TypeError"),
    "deep manifest": (lambda folder: (folder / "manifest.json").write_text("[" * 99_999), "is damaged: RecursionError"),
    "no state": (lambda folder: manifest(folder, lambda files: files.pop("state.json")), "lists no state.json"),
    "outside": (lambda folder: manifest(folder, lambda files: files.update({"../x.safetensors": {}})), "lists ["),
    "step": (lambda folder: state(folder, step=1), "state.json is of step 1"),
    "text as step": (lambda folder: state(folder, step="2"), "state.json is of step '2'"),
    "other state": (lambda folder: replace(folder, "state.json", b"[2]"), "is damaged: TypeError"),
    "manifest": (lambda folder: (folder / "manifest.json").write_text("{"), "step-000000002 is damaged"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "format": (lambda folder: (folder / "manifest.json").write_text('{"format": 99}'), "written in format 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_reported_and_the_previous_used(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, message = DAMAGES[damage]
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(make(1))
    checkpoints.write(make(2))
    harm(tmp_path / "step-000000002")
    with pytest.raises(ValueError, match="step-000000002 is damaged"):
        read_checkpoint(tmp_path / "step-000000002")
    check(checkpoints.newest(), 1)
    said = capsys.readouterr().err
    assert message in said
    assert "renamed to damaged-step-000000002, using step-000000001 instead" in said
    assert listed(tmp_path) == ["damaged-step-000000002", "step-000000001"]
    flip_a_bit(tmp_path / "step-000000001")
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged-step-000000002, step-000000001 are damaged; start again in"):
            checkpoints.newest()
    assert listed(tmp_path) == ["damaged-step-000000002", "step-000000001"]
    checkpoints.write(make(2))  # the name is free, and the damaged checkpoint does not count
    assert listed(tmp_path) == ["damaged-step-000000002", "step-000000001", "step-000000002"]
    check(checkpoints.newest(), 2)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(make(1))
    folder = tmp_path / "step-000000001"
    pickled = io.BytesIO()
    torch.save({"a": torch.zeros(1)}, pickled)
    replace(folder, "model.safetensors", pickled.getvalue())
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(errno.EACCES, "no")

    with pytest.raises(OSError, match="could not be written"):
        write_folder(tmp_path / "result", fill)
    assert list(tmp_path.iterdir()) == []


def test_only_our_own_folders_count(tmp_path: Path) -> None:
    """Other names, even if they sort after checkpoints, are ignored and kept."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    for step in (9, 10):
        checkpoints.write(make(step))
    (folder / "step-notes.txt").write_text("mine")
    (folder / "step-000000099").write_text("a file")
    shutil.copytree(folder / "step-000000010", folder / "step-000000010.bak")
    shutil.copytree(folder / "step-000000010", tmp_path / "elsewhere")
    (folder / "step-000000098").symlink_to(tmp_path / "elsewhere")
    foreign = {path.name for path in folder.iterdir()} - {"step-000000010"}
    check(checkpoints.newest(), 10)
    checkpoints.write(make(11))
    assert {path.name for path in folder.iterdir()} == {*foreign, "step-000000011"}
    (folder / "step-000000011").rename(folder / "step-9")  # checkpoints are ordered by number, not by name
    for step in (100, 1_000_000_000):
        checkpoints.keep = 9
        checkpoints.write(make(step))
    names = ["step-9", "step-000000100", "step-1000000000"]
    assert [path.name for path in checkpoints.names()] == names
    checkpoints.write(make(99))  # a file and a link have names of checkpoints
    check(checkpoints.newest(), 1_000_000_000)
    assert (folder / "damaged-step-000000099").read_text() == "a file"
    assert (tmp_path / "elsewhere" / "state.json").exists()


def test_damaged_ones_do_not_push_a_whole_one_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.write(make(step))
    (tmp_path / "step-000000003" / "model.safetensors").unlink()  # partly removed, as by an interrupted rmtree
    checkpoints.rotate()
    assert [path.name for path in checkpoints.names()] == ["step-000000002", "step-000000003"]
    checkpoints.write(make(4))
    assert [path.name for path in checkpoints.names()] == ["step-000000002", "step-000000003", "step-000000004"]
    checkpoints.write(make(5))
    assert [path.name for path in checkpoints.names()] == ["step-000000004", "step-000000005"]
    os.truncate(tmp_path / "step-000000005" / "model.safetensors", 9)
    checkpoints.keep = 1
    checkpoints.rotate()
    check(checkpoints.newest(), 4)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_what_cannot_be_read_is_not_damaged(
    name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.write(make(step))
    real = os.open

    def broken(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path) == tmp_path / "step-000000002" / name:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", broken)
        with pytest.raises(OSError, match=r"step-000000002 cannot be read.*try again later") as caught:
            checkpoints.newest()
        assert caught.value.errno == number
    check(checkpoints.newest(), 2)
    assert len(checkpoints.names()) == 2


def test_files_that_the_manifest_does_not_list_are_not_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(make(1))
    (tmp_path / "step-000000001" / "more.safetensors").write_bytes(b"no tensors")
    check(checkpoints.newest(), 1)


def test_the_manifest_is_of_what_was_handed_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading fails if the disk has stored other bytes than those that were written."""
    real = module._write

    def careless(path: Path, content: bytes) -> None:
        real(path, content[:-1] + b"?" if path.name == "model.safetensors" else content)

    monkeypatch.setattr(module, "_write", careless)
    Checkpoints(tmp_path, keep=1).write(make(1))
    with pytest.raises(ValueError, match=r"model\.safetensors has a wrong checksum"):
        read_checkpoint(tmp_path / "step-000000001")


def recorded(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> list[tuple[str, str]]:
    """Records (operation, name) of every sync, rename and removal."""
    seen: list[tuple[str, str]] = []
    fsync, rename, replace, rmtree = os.fsync, Path.rename, Path.replace, shutil.rmtree

    def record(what: str, path: Any) -> None:
        seen.append((what, Path(path).name))

    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda handle: (record("sync", Path(f"/proc/self/fd/{handle}").readlink()), fsync(handle))[1]
        )
        patch.setattr(Path, "rename", lambda path, to: (record("rename", path), rename(path, to))[1])
        patch.setattr(Path, "replace", lambda path, to: (record("rename", path), replace(path, to))[1])
        patch.setattr(shutil, "rmtree", lambda path: (record("remove", path), rmtree(path))[1])
        action()
    return seen


def test_everything_is_on_disk_before_it_is_seen_and_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "parent" / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    seen = recorded(monkeypatch, lambda: checkpoints.write(make(1)))
    assert seen[:2] == [("sync", tmp_path.name), ("sync", "parent")]  # the new folders
    seen = recorded(monkeypatch, lambda: checkpoints.write(make(2)))
    files = {("sync", path.name) for path in (folder / "step-000000002").iterdir()}
    assert len(files) == 4
    assert set(seen[:-6]) == files
    assert seen[-6:] == [
        ("sync", ".unfinished-step-000000002"),
        ("rename", ".unfinished-step-000000002"),
        ("sync", "checkpoints"),
        ("rename", "step-000000001"),
        ("sync", "checkpoints"),
        ("remove", ".unfinished-step-000000001"),
    ]
    seen = recorded(monkeypatch, lambda: write_file(folder / "small.json", b"{}"))
    assert seen == [("sync", ".unfinished-small.json"), ("rename", ".unfinished-small.json"), ("sync", "checkpoints")]


def test_links_are_removed_never_what_they_point_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    names = [".unfinished-step-000000001", ".unfinished-small.json", ".unfinished-other"]
    targets = [kept, kept / "file", tmp_path / "nowhere"]
    for swept in (True, False):
        for name, target in zip(names, targets, strict=True):
            (folder / name).symlink_to(target)
        if swept:
            remove_unfinished(folder)
            assert not list(folder.iterdir())
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.write(make(1))
    check(checkpoints.newest(), 1)
    write_file(folder / "small.json", b"{}")
    assert (kept / "file").read_text() == "mine"
    assert (folder / "small.json").read_bytes() == b"{}"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_files_have_the_modes_that_the_user_asks_for(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_folder(tmp_path / "result", lambda folder: save_file({"a": torch.zeros(1)}, folder / "a.safetensors"))
        Checkpoints(tmp_path, keep=1).write(make(1))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def refuse(kind: Callable[[int], bool], number: int) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            if kind(os.fstat(handle).st_mode):
                raise OSError(number, os.strerror(number))
            real(handle)

        return fsync

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr(os, "fsync", refuse(stat.S_ISDIR, number))
    checkpoints.write(make(1))
    write_file(tmp_path / "small.json", b"{}")
    for kind, other in ((stat.S_ISREG, number), (stat.S_ISDIR, errno.EIO)):
        monkeypatch.setattr(os, "fsync", refuse(kind, other))
        with pytest.raises(OSError, match="could not be written") as caught:
            checkpoints.write(make(2))
        assert caught.value.errno == other
        check(checkpoints.newest(), 1)


def test_an_error_that_is_no_system_error_is_explained_too(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").touch()
        raise Exception("No space left on device (os error 28)")  # the message of tokenizers

    with pytest.raises(OSError, match="disk is full") as caught:
        write_folder(tmp_path / "result", fill)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "result", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_removal_that_fails_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(make(1))

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", broken)
        checkpoints.write(make(2))
    assert "step-000000001 could not be removed: [Errno 5]" in capsys.readouterr().err
    assert [path.name for path in checkpoints.names()] == ["step-000000002"]
    checkpoints.write(make(3))
    assert listed(tmp_path) == ["step-000000003"]


def test_what_others_wrote_into_a_folder_is_on_disk_before_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers saves the student without syncing it, so the files must be synced afterwards."""

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_text("weights")
        (folder / "tokens").mkdir()
        (folder / "tokens" / "vocabulary.txt").write_text("words")

    seen = recorded(monkeypatch, lambda: write_folder(tmp_path / "student", fill))
    renamed = seen.index(("rename", ".unfinished-student"))
    assert {("sync", name) for name in ("model.safetensors", "tokens", "vocabulary.txt")} <= set(seen[:renamed])
