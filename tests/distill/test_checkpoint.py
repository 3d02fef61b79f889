"""Checkpoints under full disks, kills and damage: what was saved stays, what is broken is refused."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

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
    return Checkpoint(step, {"data": {"place": [0, [12, 3]], "note": "größe"}}, tensors)


def check(found: Checkpoint | None, step: int) -> None:
    assert found is not None
    expected = make(step)
    assert (found.step, found.numbers) == (step, expected.numbers)
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


class Killed(BaseException):
    """What a kill is to the code: nothing after it runs, no handler of `Exception` sees it."""


@contextmanager
def failing(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fails the `count`-th action on the disk (half-way for tensors); yields the actions that were seen."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def action(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == count:
                if name == "save_file":
                    Path(args[1]).write_bytes(b"half")
                if name == "write_text":
                    args[0].write_bytes(b"{")
                raise error
            return real(*args, **kwargs)

        patch.setattr(owner, name, action)

    with monkeypatch.context() as patch:
        wrap(module, "save_file")
        for name in ("write_text", "rename", "replace", "mkdir"):
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
    folder = tmp_path / "count"
    Checkpoints(folder, 1).write(make(1))
    moments = actions(lambda: Checkpoints(folder, 1).write(make(2)), monkeypatch)
    assert {"save_file", "write_text", "fsync", "rename", "rmtree"} <= set(moments)
    outcomes = set()
    for moment in range(1, len(moments) + 1 + damaged):
        folder = tmp_path / str(moment)
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.write(make(1))
        if damaged:  # a broken folder already has the name of the one to write
            (folder / "step-000000002").mkdir()
            (folder / "step-000000002" / "rest").touch()
        with failing(moment, Killed(), monkeypatch), suppress(Killed):
            checkpoints.write(make(2))
        found = checkpoints.newest()
        assert found is not None
        check(found, found.step)
        outcomes.add(found.step)
        remove_unfinished(folder)
        assert not list(folder.glob(f"{TEMPORARY}*"))
        checkpoints.write(make(3))
        assert [path.name for path in checkpoints.names()] == ["step-000000003"]
    assert outcomes == {1, 2}


def test_a_failure_of_any_write_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "count"
    Checkpoints(folder, 1).write(make(1))
    moments = actions(lambda: Checkpoints(folder, 1).write(make(2)), monkeypatch)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = max(number for number, name in enumerate(moments, 1) if name == "rename")
    for moment in (number for number, name in enumerate(moments, 1) if name != "rmtree" and number <= last):
        checkpoints = Checkpoints(tmp_path / str(moment), keep=1)
        checkpoints.write(make(1))
        with (
            failing(moment, full, monkeypatch),
            pytest.raises(OSError, match=r"disk is full.*make room.*--resume") as caught,
        ):
            checkpoints.write(make(2))
        assert caught.value.errno == errno.ENOSPC
        check(checkpoints.newest(), 1)
        assert not list(checkpoints.folder.glob(f"{TEMPORARY}*"))  # it also gives the room back


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system itself refuses to write files beyond `size`."""
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
    write_file(file, "before")
    with file_size_limit(size), pytest.raises(OSError, match="disk is full"):
        write_file(file, "x" * (size + 1))
    assert file.read_text() == "before"
    assert not list(tmp_path.glob(f"{TEMPORARY}*"))


def flip_a_bit(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (flip_a_bit, "model.safetensors has a wrong checksum"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 50), "model.safetensors has 50 bytes, expected"),
    "gone": (lambda folder: (folder / "progress.safetensors").unlink(), "progress.safetensors"),
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
    assert message in capsys.readouterr().err
    harm(tmp_path / "step-000000001")
    with pytest.raises(ValueError, match="step-000000002, step-000000001 are damaged"):
        checkpoints.newest()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(make(1))
    folder = tmp_path / "step-000000001"
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "model.safetensors"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": module._sha256(file)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError(errno.EACCES, "no")

    with pytest.raises(OSError, match="could not be written"):
        write_folder(tmp_path / "result", fill)
    assert list(tmp_path.iterdir()) == []
