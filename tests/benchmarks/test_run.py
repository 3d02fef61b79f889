"""Every record has all keys. A measurement that is wrong, too large or too slow also gives a record."""

import json

import pytest
import torch

from benchmarks import roofline
from benchmarks.__main__ import main
from benchmarks.measure import records
from benchmarks.measure.workload import Workload
from benchmarks.providers import BACKENDS, PROVIDERS, Provider
from benchmarks.suites import accuracy, inference

SMALL = "2x3x40x8x4"


def run(tmp_path, *arguments):
    out = tmp_path / "records.jsonl"
    assert main(["run", "--device", "cpu", "--seconds", "0.01", "--threads", "1", "--out", str(out), *arguments]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert found == records.read([out])
    for record in found:
        assert tuple(record) == records.KEYS
        assert record["status"] in records.STATUSES
        assert set(record["shape"]) == {"B", "S", "A", "d_t", "d_s", "relations", "mask"}
        if record["median_ms"] is not None:  # every speed comes with its error
            assert record["status"] == "ok"
            assert record["error_value"] is not None
            assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
            if record["mode"] == "full" and record["provider"] != roofline.NAME:
                assert record["error_grad"] is not None
        if record["status"] not in ("ok", "wrong"):
            assert record["reason"]
    return found


def by_provider(found):
    return {record["provider"]: record for record in found}


def test_loss(tmp_path):
    found = run(tmp_path, "--shapes", SMALL, "--providers", "eager", "torch", "cuda", "--modes", "full", "forward")
    assert [record["provider"] for record in found] == [roofline.NAME, *["eager", "torch", "cuda"] * 2]
    full = by_provider(found[:4])
    assert full["eager"]["status"] == full["torch"]["status"] == "ok"
    assert full["eager"]["pairs"] == 2 * 3 * 40 * 40
    assert full["torch"]["exponentials"] == 2 * full["torch"]["pairs"]
    assert full["torch"]["saved_bytes"] < full["eager"]["saved_bytes"]
    assert full["cuda"]["status"] == "unsupported"
    assert found[-2]["saved_bytes"] == 0


def _reversed(inputs):
    exchanged = inputs._replace(teacher=inputs.student, student=inputs.teacher)
    dense = PROVIDERS["eager"].build(exchanged)
    return lambda teacher, student: dense(student, teacher)


def _no_scale(inputs):
    dense = PROVIDERS["eager"].build(inputs)
    return lambda teacher, student: dense(teacher, {name: 1.1 * x for name, x in student.items()})


def _broken(inputs):
    return lambda teacher, student: torch.tensor(float("nan"), requires_grad=True) * student["q"].sum()


@pytest.mark.parametrize("build", [_reversed, _no_scale, _broken])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_loss_gets_no_speed(tmp_path, monkeypatch, build, dtype):
    monkeypatch.setitem(PROVIDERS, "bad", Provider(build, "wrong on purpose"))
    shape = "2x3x40x8x8"
    found = by_provider(run(tmp_path, "--shapes", shape, "--dtypes", dtype, "--providers", "torch", "bad"))
    if build is _no_scale and dtype == "bfloat16":  # in bfloat16, an error of 0.1 is within the tolerance
        assert found["bad"]["error_grad"] > 0.05
        return
    assert found["bad"]["status"] == "wrong"
    assert found["bad"]["median_ms"] is found["bad"]["peak_bytes"] is None
    assert "relative error" in found["bad"]["reason"]
    assert found["torch"]["status"] == "ok"


@pytest.mark.slow
def test_too_large_too_slow_and_broken_are_records(tmp_path, monkeypatch):
    def fail(inputs):
        raise KeyError("nothing")

    monkeypatch.setitem(PROVIDERS, "failing", Provider(fail, "fails on purpose"))
    shape = ("--shapes", "2x16x512x8x4")
    found = run(tmp_path, *shape, "--providers", "eager", "failing", "torch", "--memory", "100MiB")
    assert [record["status"] for record in found[1:]] == ["oom", "failed", "ok"]
    (tmp_path / "records.jsonl").unlink()
    found = run(tmp_path, *shape, "--providers", "torch", "--timeout", "0.001")
    assert found[1]["status"] == "slow"
    assert found[1]["median_ms"] is None


@pytest.mark.slow
def test_memory(tmp_path):
    arguments = ("--suite", "memory", "--shapes", "1x4x256x8x4", "3x4x256x8x4", "--batches", "1x4x256x8x4")
    found = run(tmp_path, *arguments, "--providers", "eager", "torch", "--budget", "16MiB", "--max-batch", "4")
    largest = by_provider(found[:2])
    assert 1 <= largest["eager"]["shape"]["B"] < largest["torch"]["shape"]["B"] <= 4
    for record in found[:2]:
        assert record["peak_bytes"] + record["detail"]["inputs_bytes"] <= 16 * 2**20
    eager = [record for record in found[2:] if record["provider"] == "eager"]
    assert eager[0]["saved_bytes"] > 0
    assert eager[1]["saved_bytes"] == pytest.approx(3 * eager[0]["saved_bytes"], rel=0.1)
    assert eager[1]["peak_bytes"] > 1.5 * eager[0]["peak_bytes"]


def test_inference(tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "students", lambda: {(2, 24): (1.0, None), (1, 24): (2.0, 1)})
    found = run(tmp_path, "--suite", "inference", "--shapes", "2x16")
    assert [record["provider"] for record in found] == ["2x24", "1x24"]
    assert all(record["status"] == "ok" and 0 < record["error_value"] < 1e-5 for record in found)
    assert found[0]["detail"]["parameters"] > found[1]["detail"]["parameters"]


def test_published_students():
    published = inference.students()
    assert published[12, 768] == (1.0, None)
    assert published[6, 384] == (5.3, 22)
    assert {size: speed for size, (speed, _) in published.items()} == {
        (12, 768): 1.0,
        (6, 768): 2.0,
        (12, 384): 2.7,
        (6, 384): 5.3,
        (4, 384): 7.8,
        (3, 384): 10.1,
    }


@pytest.fixture
def two_divergences(monkeypatch):
    monkeypatch.setattr(accuracy, "_SMALL", Workload(1, 4, 300, 16, 16))
    monkeypatch.setattr(accuracy, "_DIVERGENCES", (1e-2, 1e-5))


def test_accuracy(tmp_path, two_divergences):
    arguments = ("--suite", "accuracy", "--shapes", "2x2x70x8x4", "--masks", "holes", "packed+prefix")
    found = run(tmp_path, *arguments, "--dtypes", "bfloat16", "--providers", *BACKENDS, "eager")
    ours = [record for record in found if record["provider"] in ("cpu", "torch")]
    assert {record["status"] for record in ours} == {"ok"}
    judged = [record["shape"] for record in found if "allowed_grad" in record["detail"]]
    assert {(shape["mask"], shape["relations"]) for shape in judged} == {
        (mask, pair) for mask in ("holes", "packed+prefix") for pair in ("qq", "qk")
    }
    small = [
        record for record in ours if record["detail"].get("reduction") == "sequence" and record["provider"] == "torch"
    ]
    found_kl = [record["detail"]["kl"] for record in small]
    assert found_kl == pytest.approx([1e-2, 1e-5], rel=0.4)
    assert all(0 < record["error_value"] < 1e-2 for record in small)


def test_a_backend_beyond_its_tolerance_is_wrong(tmp_path, monkeypatch, two_divergences):
    right = PROVIDERS["torch"]

    def off(inputs):
        loss = right.build(inputs)
        return lambda teacher, student: 1.0001 * loss(teacher, student)

    monkeypatch.setitem(PROVIDERS, "torch", Provider(off, "a little wrong"))
    arguments = ("--suite", "accuracy", "--shapes", "2x2x70x8x4", "--masks", "half", "--dtypes", "float16")
    found = run(tmp_path, *arguments, "--providers", "torch")
    assert "ok" in {record["status"] for record in found}  # the tolerance of half precision allows this error
    (tmp_path / "records.jsonl").unlink()
    found = run(tmp_path, *arguments[:-2], "--relations", "qq", "--providers", "torch")
    judged = [record for record in found if "allowed_grad" in record["detail"] and record["dtype"] == "float32"]
    assert {record["status"] for record in judged} == {"wrong"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "2x2"], "--shapes"),
        (["--seconds", "0"], "--seconds"),
        (["--suite", "inference", "--shapes", SMALL], "--shapes"),
        (["--suite", "train_step", "--shapes", "tiny:3x0"], "--shapes"),
        (["--suite", "train_step", "--shapes", "minilm-l6-h384-bert-base:3x32"], "MODEL:BxS"),
        (["--suite", "train_step", "--rounds", "0"], "--rounds"),
        (["--budget", "2GB"], "2GiB"),
        (["--relations", "q"], "--relations"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["run", "--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_bad_records_are_named(tmp_path):
    file = tmp_path / "bad.jsonl"
    for text, message in (("nonsense", "line 1: expected a JSON object"), ('{"suite": "loss"}', "lacks provider")):
        file.write_text(text)
        for path in (file, tmp_path):
            with pytest.raises(ValueError, match=message):
                records.read([path])
