"""--cache-teacher: exact values, runs that need no teacher, damage, sizes, and full disks."""

from __future__ import annotations

import errno
import io
import math
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minilm_kernels import MiniLMv2Loss
from minilm_kernels.distill import distill, loop, teacher_cache
from minilm_kernels.distill.packing import PADDING, Samples
from minilm_kernels.distill.teacher_cache import TeacherCache
from minilm_kernels.losses import QKV

from .test_loop import Settings, records, stop_at, weights
from .tiny import make_texts

WIDTHS = (6, 4, 2)
LENGTHS = [5, 9, 1, 7]
EXACT = {"cache_teacher_dtype": "float32"}


def make_samples(seed: int = 0) -> Samples:
    """Four samples of LENGTHS tokens, of one or two documents, with room for 9."""
    chance = np.random.default_rng(seed)
    positions = np.full((4, 9), PADDING, np.int32)
    for row, length in zip(positions, LENGTHS, strict=True):
        row[:length] = np.arange(length)
        row[length // 2 : length] = np.arange(length - length // 2)
    return Samples(chance.integers(5, 60, (4, 9)).astype(np.int32), positions)


def make_values(packed: bool, seed: int = 0) -> QKV:
    chance = torch.Generator().manual_seed(seed)
    shape = (sum(LENGTHS),) if packed else (len(LENGTHS), max(LENGTHS))
    return QKV(*(torch.randn(*shape, width, generator=chance) for width in WIDTHS))


def make_cache(folder: Path, *, packed: bool = True, dtype: torch.dtype = torch.float32, **key: Any) -> TeacherCache:
    return TeacherCache(folder, key, WIDTHS, 9, packed=packed, dtype=dtype)


def valid(qkv: QKV, packed: bool) -> list[torch.Tensor]:
    return list(qkv) if packed else [torch.cat([x[i, :n] for i, n in enumerate(LENGTHS)]) for x in qkv]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_read_as_they_were_stored(
    packed: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "ENTRIES_A_FILE", 3)
    samples, values = make_samples(), make_values(packed)
    if not packed:  # values in padding never matter
        values.query[0, LENGTHS[0] :] = math.nan
    with closing(make_cache(tmp_path, packed=packed, dtype=dtype)) as cache:
        assert cache.read(1000, samples) is None
        rounded = cache.store(1000, samples, values)
    with closing(make_cache(tmp_path, packed=packed, dtype=dtype)) as cache:
        found = cache.read(1000, samples)
        assert found is not None
        assert found.query.isfinite().all()
        for one, other, given in zip(valid(found, packed), valid(rounded, packed), valid(values, packed), strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other)
            assert torch.equal(one, given.to(dtype))
        part = cache.read(1001, samples.part(slice(1, 3)))  # micro-batches of another size
        assert part is not None
        tokens = part.value if packed else part.value.flatten(0, 1)[: 9 + 1]
        assert torch.equal(valid(found, packed)[2][5 : 5 + 9 + 1], tokens)
        assert cache.read(1004, samples) is None
        assert len(list(cache.folder.glob("*.bin"))) == 2


def forbid_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(loop, "teacher_qkv", run)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"packing": False}, marks=pytest.mark.slow),
        pytest.param({"mask": "prefix"}, marks=pytest.mark.slow),
        pytest.param({"teacher_dtype": "bfloat16", "cache_teacher_dtype": "bfloat16"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_results_are_those_without_a_cache_to_the_last_bit(
    options: dict[str, Any], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs, with dropout: without a cache, while it is filled, and with a teacher that does not run."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(make_texts(40)))
    options = {"text": [text], "max_steps": 10, "eval_fraction": 0, "dropout": 0.1, **EXACT, **options}
    plain = distill(settings(output_dir=tmp_path / "plain", **options))
    assert records(plain)[-1]["epoch"] >= 1
    options["cache_teacher"] = tmp_path / "cache"
    cold = distill(settings(output_dir=tmp_path / "cold", **options))
    forbid_teacher(monkeypatch)
    warm = distill(settings(output_dir=tmp_path / "warm", **options))
    for run in (cold, warm):
        assert records(run) == records(plain)
        assert weights(run) == weights(plain)


@pytest.mark.slow
def test_other_students_and_batches_need_no_teacher(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eval_fraction": 0, "dropout": 0.0, "cache_teacher": tmp_path / "cache", **EXACT}
    first = distill(settings(output_dir=tmp_path / "first", **options))
    forbid_teacher(monkeypatch)
    for number, changes in enumerate(
        [
            {"student_hidden_size": 48, "learning_rate": 1e-4},
            {"relations": {"vv": 1.0}, "trim_vocabulary": 50},
            {"gradient_accumulation_steps": 4},
            {"total_batch_size": 6, "max_steps": 8},
        ]
    ):
        later = distill(settings(output_dir=tmp_path / str(number), **{**options, **changes}))
        if "gradient_accumulation_steps" in changes:
            assert [r["loss"] for r in records(later)] == pytest.approx([r["loss"] for r in records(first)], rel=1e-5)
    other = tmp_path / "other.txt"
    other.write_text("w1 w2 w3\n\nw4 w5 w6\n\n" * 50)
    for changes in (
        {"seed": 1},
        {"teacher_layer": 1},
        {"max_seq_length": 24},
        {"cache_teacher_dtype": "bfloat16"},
        {"eval_fraction": 0.1},
        {"text": [other]},
    ):
        with pytest.raises(AssertionError, match="the teacher ran"):
            distill(settings(output_dir=tmp_path / "other", **{**options, **changes}))
        shutil.rmtree(tmp_path / "other")


def test_bfloat16_changes_a_row_by_no_more_than_the_bound() -> None:
    """Rounding to 8 bits changes a vector by u = 2^-8 of each number, and a score by d = (2u + u^2) |scale| sum |q k|.

    With D the largest d of a row, a probability p changes by a factor between exp(-2D) and exp(2D), and the row's KL by
    at most (exp(2D) - 1) sum p |log p/q| + 2D. docs/training-speed.md has the derivation.
    """
    chance = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 64, 2, 12, generator=chance, dtype=torch.float64) for _ in range(2))

    def log_relation(x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(torch.einsum("biad,bjad->baij", x, x) / math.sqrt(12), -1)

    def row_kl(log_t: torch.Tensor, log_s: torch.Tensor) -> torch.Tensor:
        return (log_t.exp() * (log_t - log_s)).sum(-1)

    u = 2.0**-8
    exact, rounded, log_s = map(log_relation, (teacher, teacher.bfloat16().double(), student))
    products = torch.einsum("biad,bjad->baij", teacher.abs(), teacher.abs()) / math.sqrt(12)
    largest = (2 * u + u * u) * products.amax(-1)
    bound = (torch.exp(2 * largest) - 1) * (exact.exp() * (exact - log_s).abs()).sum(-1) + 2 * largest
    error = (row_kl(rounded, log_s) - row_kl(exact, log_s)).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-4  # the rounding is there

    loss = MiniLMv2Loss(2, relations={"qq": 1.0}, reduction="sum", backend="reference")
    qkv = [QKV(*[x.flatten(2)] * 3) for x in (teacher, teacher.bfloat16().double(), student)]
    difference = loss(qkv[1], qkv[2]) - loss(qkv[0], qkv[2])
    assert abs(float(difference)) == pytest.approx(float((row_kl(rounded, log_s) - row_kl(exact, log_s)).sum().abs()))


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_bits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are rounded whether they are computed or read, so that results do not depend on what is stored."""
    options = {"eval_fraction": 0, "dropout": 0.2, "max_steps": 12}
    whole = distill(settings(output_dir=tmp_path / "whole", cache_teacher=tmp_path / "first", **options))
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        distill(settings(cache_teacher=tmp_path / "second", **options))
    for file in (tmp_path / "second").glob("*/*.bin"):
        os.truncate(file, file.stat().st_size // 2)
    continued = distill(settings(cache_teacher=tmp_path / "second", resume_from_checkpoint=True, **options))
    assert records(continued) == records(whole)
    assert weights(continued) == weights(whole)


def damaged_byte(at: int) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)

    return change


@pytest.mark.parametrize(
    "damage",
    [
        *map(damaged_byte, (0, 9, 17, 21, 25, 28, 200)),
        lambda file: os.truncate(file, 10),
        lambda file: os.truncate(file, 200),
        lambda file: file.write_bytes(b"\1" * 100_000),
    ],
)
def test_damage_is_found_said_and_repaired(
    damage: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, values = make_samples(), make_values(packed=True)
    for _ in range(2):
        with closing(make_cache(tmp_path)) as cache:
            cache.store(0, samples, values)
        assert cache.read(0, samples) is not None
        (file,) = cache.folder.glob("*.bin")
        assert not capsys.readouterr().err
        damage(file)
        for _ in range(2):
            assert cache.read(0, samples) is None
        assert capsys.readouterr().err.count(f"{file} is damaged at sample 0") == 1


def test_damage_that_two_threads_find_at_once_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop reads beside the thread that reads ahead, if micro-batches become smaller."""
    samples, said = make_samples(), list[str]()
    with closing(make_cache(tmp_path)) as cache:
        cache.store(0, samples, make_values(packed=True))
    (file,) = cache.folder.glob("*.bin")
    damaged_byte(200)(file)

    def say(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            other = threading.Thread(target=cache.read, args=(0, samples))
            other.start()
            other.join(600)

    monkeypatch.setattr(teacher_cache, "say", say)
    assert cache.read(0, samples) is None
    assert len(said) == 1


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(make_cache(tmp_path)) as cache:
        (cache.folder / "00000000.bin").mkdir()
        assert cache.read(0, make_samples()) is None
    assert "00000000.bin cannot be read ([Errno 21]" in capsys.readouterr().err


def test_a_removed_file_is_not_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(make_cache(tmp_path)) as cache:
        cache.store(0, make_samples(), make_values(packed=True))
    shutil.rmtree(cache.folder)
    assert cache.read(0, make_samples()) is None
    assert not capsys.readouterr().err


def test_values_of_other_tokens_are_refused(tmp_path: Path) -> None:
    with closing(make_cache(tmp_path)) as cache:
        cache.store(0, make_samples(), make_values(packed=True))
    other = make_samples()
    other.positions[0, :5] = range(5)  # the same tokens as one document
    for samples in (make_samples(seed=1), other):
        with pytest.raises(ValueError, match="has the values of other tokens for sample 0"):
            cache.read(0, samples)


def test_folders_differ_by_teacher_and_settings_and_say_them(tmp_path: Path) -> None:
    caches = [
        make_cache(tmp_path, teacher="a"),
        make_cache(tmp_path, teacher="b"),
        make_cache(tmp_path, teacher="a", dtype=torch.bfloat16),
    ]
    again = make_cache(tmp_path, teacher="a")
    assert len({cache.folder for cache in caches}) == 3
    assert again.folder == caches[0].folder
    header = again.folder / "header.json"
    assert '"teacher": "a"' in header.read_text()
    assert [path.name for path in again.folder.iterdir()] == ["header.json"]
    header.write_text("{}")
    with pytest.raises(ValueError, match=r"header\.json is damaged; remove the folder"):
        make_cache(tmp_path, teacher="a")
    for cache in (*caches, again):
        cache.close()


Usage = namedtuple("Usage", "total used free")


@pytest.mark.slow
def test_sizes_are_said_and_refused_before_the_first_step(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"cache_teacher": tmp_path / "cache", "eval_fraction": 0}
    needed = 6 * 8 * 12288  # pages for 32 tokens x 3 x 48 values x 2 bytes and a header
    free = needed - 1
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    with pytest.raises(
        OSError, match=r"--cache-teacher: 48 samples x 32 tokens x 144 values x 2 bytes are up to 0.0 GB"
    ):
        distill(settings(**options))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    free = needed
    distill(settings(**options))
    assert "--cache-teacher: 48 samples x 32 tokens" in capsys.readouterr().err
    stored = sum(file.stat().st_blocks * 512 for file in (tmp_path / "cache").glob("*/*.bin"))
    assert 0.8 * needed < stored <= needed
    free = needed - stored  # another student writes nothing
    distill(settings(output_dir=tmp_path / "second", **options))


@pytest.mark.slow
def test_a_full_disk_ends_the_cache_and_not_the_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = distill(settings(output_dir=tmp_path / "plain", **EXACT))
    real, count = os.open, iter(range(10**6))

    def full(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(".bin") and next(count) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(teacher_cache.os, "open", full)
    cached = distill(settings(cache_teacher=tmp_path / "cache", **EXACT))
    assert weights(cached) == weights(plain)
    assert capsys.readouterr().err.count("later samples are not stored: [Errno 28] No space left") == 1


def test_writes_that_wait_behind_a_failed_one_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    all_wait, opened = threading.Event(), []

    def full(path: Path, *arguments: Any) -> int:
        assert all_wait.wait(600)
        opened.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache.os, "open", full)
    with closing(make_cache(tmp_path)) as cache:
        for place in range(0, 4 * teacher_cache.WRITES_BEHIND, 4):
            cache.store(place, make_samples(), make_values(packed=True))
        all_wait.set()
    assert len(opened) == 1
    assert capsys.readouterr().err.count("later samples are not stored: [Errno 28] No space left") == 1


def test_an_entry_that_is_being_written_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that is repeated with smaller micro-batches reads what its first attempt is still storing."""
    samples, real = make_samples(), os.fdopen
    begun, seen = threading.Event(), threading.Event()

    class Slow(io.FileIO):
        def write(self, content: Any) -> int:
            written = super().write(content)
            begun.set()
            assert seen.wait(600)
            return written

    monkeypatch.setattr(teacher_cache.os, "fdopen", lambda handle, mode: Slow(handle, mode))
    with closing(make_cache(tmp_path)) as cache:
        cache.store(0, samples, make_values(packed=True))
        assert begun.wait(600)
        found = cache.read(0, samples)
        seen.set()
    monkeypatch.setattr(teacher_cache.os, "fdopen", real)
    assert found is None
    assert cache.read(0, samples) is not None
    assert not capsys.readouterr().err


def test_writers_of_the_same_and_of_other_entries_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two objects, as two processes have, write the same values and neighbours at the same time."""
    samples, values = make_samples(), make_values(packed=True)
    one, other = make_cache(tmp_path), make_cache(tmp_path)
    for place in range(0, 400, 4):
        one.store(place, samples, values)
        other.store(place if place % 8 else place + 400, samples, values)
    one.close()
    other.close()
    for place in [*range(0, 400, 4), *range(400, 800, 8)]:
        found = one.read(place, samples)
        assert found is not None
        assert torch.equal(found.key, values.key)
