"""The cache of compiled kernels returns correct code or none, for every state of the folder."""

import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from minilm_kernels.relation.backends import cuda_cache
from minilm_kernels.relation.backends.cuda_cache import VARIABLE, KernelCache, default_folder

DIGEST = "0" * 64
CODE = bytes(range(256)) * 40
ABOUT = {"name": "symmetric_1_2_1_1_0", "architecture": 90}


@pytest.fixture
def cache(tmp_path):
    return KernelCache(tmp_path / "parent" / "cache")


def _file(cache):
    return cache.folder / f"{DIGEST}.kernel"


def test_what_was_stored_is_found_again(cache):
    assert cache.get(DIGEST) is None
    assert cache.entries() == []
    assert not cache.folder.exists()  # reading does not create it
    cache.put(DIGEST, CODE, ABOUT)
    assert cache.get(DIGEST) == CODE
    assert KernelCache(cache.folder).get(DIGEST) == CODE
    assert cache.get("1" * 64) is None
    assert cache.entries() == [{**ABOUT, "bytes": len(CODE)}]
    assert cache.clear() == 1
    assert cache.get(DIGEST) is None
    assert list(cache.folder.iterdir()) == []


def test_nobody_else_may_read_or_write_it(cache):
    before = os.umask(0)
    try:
        cache.put(DIGEST, CODE, ABOUT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(_file(cache).stat().st_mode) == 0o600


@pytest.mark.parametrize("place", [0, 20, 40, 60, 80, 5000, -1])
def test_one_changed_bit_is_seen(cache, place, caplog):
    cache.put(DIGEST, CODE, ABOUT)
    content = bytearray(_file(cache).read_bytes())
    content[place] ^= 1
    _file(cache).write_bytes(content)
    assert cache.get(DIGEST) is None
    assert cache.entries() == []
    assert "damaged" in caplog.text
    cache.put(DIGEST, CODE, ABOUT)  # compiled again
    assert cache.get(DIGEST) == CODE


@pytest.mark.parametrize("size", [0, 1, 33, 64, 65, 100])
def test_a_file_that_was_cut_off_is_seen(cache, size):
    cache.put(DIGEST, CODE, ABOUT)
    _file(cache).write_bytes(_file(cache).read_bytes()[:size])
    assert cache.get(DIGEST) is None


def test_a_file_of_another_program_is_not_code(cache):
    cache.put(DIGEST, CODE, ABOUT)
    _file(cache).write_bytes(json.dumps(ABOUT).encode() + b"\n" + CODE)
    assert cache.get(DIGEST) is None


def test_a_link_in_the_place_of_a_file_is_not_followed(cache, tmp_path):
    cache.put(DIGEST, CODE, ABOUT)
    elsewhere = tmp_path / "elsewhere"
    _file(cache).rename(elsewhere)
    _file(cache).symlink_to(elsewhere)
    assert cache.get(DIGEST) is None
    before = elsewhere.read_bytes()
    cache.put(DIGEST, CODE, ABOUT)  # replaces the link, not its target
    assert cache.get(DIGEST) == CODE
    assert elsewhere.read_bytes() == before


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir()], ids=["pipe", "folder"])
def test_what_is_no_file_does_not_hang(cache, make):
    cache.put(DIGEST, CODE, ABOUT)
    _file(cache).unlink()
    make(_file(cache))
    assert cache.get(DIGEST) is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_not_used(cache, mode, caplog):
    cache.put(DIGEST, CODE, ABOUT)
    cache.folder.chmod(mode)
    assert cache.get(DIGEST) is None
    cache.put("1" * 64, CODE, ABOUT)
    cache.folder.chmod(0o700)
    assert KernelCache(cache.folder).get("1" * 64) is None
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "other users can write to the folder" in warnings[0].getMessage()
    assert VARIABLE in warnings[0].getMessage()


def test_a_file_that_others_may_write_to_is_not_used(cache):
    cache.put(DIGEST, CODE, ABOUT)
    _file(cache).chmod(0o666)
    assert cache.get(DIGEST) is None


def test_another_users_folder_is_not_used(cache, monkeypatch, caplog):
    cache.put(DIGEST, CODE, ABOUT)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    assert cache.get(DIGEST) is None
    assert "belongs to another user" in caplog.text


def _full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
def test_where_nothing_can_be_written_one_warning_is_all(cache, monkeypatch, caplog, call):
    """A full disk or a read-only folder does not prevent the use of the compiled kernel."""
    real_open = os.open
    if call == "open":
        monkeypatch.setattr(os, "open", lambda path, flags, *a, **k: (
            _full() if flags & os.O_CREAT else real_open(path, flags, *a, **k)
        ))  # fmt: skip
    else:
        monkeypatch.setattr(Path if call == "mkdir" else os, call, _full)
    cache.put(DIGEST, CODE, ABOUT)
    cache.put("1" * 64, CODE, ABOUT)
    monkeypatch.undo()
    assert caplog.text.count("No space left on device") == 1
    assert cache.get(DIGEST) == CODE  # from memory
    assert KernelCache(cache.folder).get(DIGEST) is None
    assert not cache.folder.exists() or list(cache.folder.iterdir()) == []


def test_the_cache_is_a_file(tmp_path, caplog):
    (tmp_path / "cache").write_text("mine")
    cache = KernelCache(tmp_path / "cache")
    cache.put(DIGEST, CODE, ABOUT)
    assert cache.get(DIGEST) == CODE
    assert KernelCache(tmp_path / "cache").get(DIGEST) is None
    assert (tmp_path / "cache").read_text() == "mine"
    assert len([record for record in caplog.records if "writing" in record.getMessage()]) == 1


def test_threads_that_fail_at_once_warn_once(tmp_path, caplog):
    """Two threads store kernels, and each could see that there was no warning yet."""
    (tmp_path / "cache").write_text("mine")
    both = threading.Barrier(2)

    class Meeting(KernelCache):
        said = False

        @property
        def _warned(self):
            found = self.said
            with suppress(threading.BrokenBarrierError):
                both.wait(1)
            return found

        @_warned.setter
        def _warned(self, value):
            self.said = value

    cache = Meeting(tmp_path / "cache")
    threads = [threading.Thread(target=cache.put, args=(digit * 64, CODE, ABOUT)) for digit in "01"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert len(caplog.records) == 1


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert default_folder() == tmp_path / ".cache/minilm_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg/minilm_kernels"
    monkeypatch.setenv(VARIABLE, "~/kernels")
    assert default_folder() == tmp_path / "kernels"


# Loads the module without the package, and thus without torch, so that processes start quickly.
_WRITE_FOREVER = f"""
import importlib.util, os, pathlib, sys
spec = importlib.util.spec_from_file_location("cuda_cache", {cuda_cache.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
cache = module.KernelCache(pathlib.Path(sys.argv[1]))
while True:
    cache.put({DIGEST!r}, bytes([os.getpid() % 251]) * 200_000, {{}})
    print(flush=True)
"""


def test_killed_writers_and_readers_beside_them(cache):
    """Eight processes write one entry repeatedly and are killed one by one: the entry is always complete."""
    command = [sys.executable, "-c", _WRITE_FOREVER, str(cache.folder)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(8)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"\n"
        for writer in writers:
            for _ in range(20):
                code = cache.get(DIGEST)
                assert code is not None
                assert len(code) == 200_000
                assert len(set(code)) == 1
            writer.kill()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate(timeout=600)
    left = [path for path in cache.folder.iterdir() if path != _file(cache)]
    for path in left:  # an hour later, the next writer removes them
        os.utime(path, (time.time() - 4000,) * 2)
    cache.put("1" * 64, CODE, ABOUT)
    assert sorted(path.name for path in cache.folder.iterdir()) == [f"{DIGEST}.kernel", f"{'1' * 64}.kernel"]
