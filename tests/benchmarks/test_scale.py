"""The arithmetic of the estimates for many devices, and what is said to bind."""

import pytest

from benchmarks.__main__ import main
from benchmarks.commands.scale import NETWORKS, SMALL_PASSES, Parts, Setup, estimate, exchange_ms
from benchmarks.measure import records
from benchmarks.measure.workload import Workload
from tests.benchmarks.test_report import made

PARTS = Parts({1: 13.0, 4: 22.0, 64: 320.0}, 0.5, 2.0, tokens=500.0, elements=25_000_000, last=10_000_000)
SETUP = Setup(samples=256, node=8, inside=400e9, between=50e9, latency=0.0, element_bytes=4)


@pytest.mark.parametrize(
    ("samples", "ms"), [(1, 13.0), (2, 16.0), (4, 22.0), (34, 171.0), (64, 320.0), (128, 640.0), (129, 653.0)]
)
def test_passes_are_whole_or_interpolated(samples, ms):
    assert PARTS.compute(samples) == pytest.approx(ms)


def test_fewer_samples_than_measured_take_no_less():
    parts = PARTS._replace(passes={4: 22.0, 64: 320.0})
    assert parts.compute(1) == parts.compute(3) == parts.compute(4) == 22.0


def test_exchange():
    assert exchange_ms(1, 10**9, SETUP) == 0
    assert exchange_ms(2, 4 * 10**8, SETUP) == pytest.approx(1.0)  # each sends half of it twice
    assert exchange_ms(8, 4 * 10**8, SETUP) == pytest.approx(1.75)
    assert exchange_ms(16, 4 * 10**8, SETUP) == pytest.approx(15.0)  # over the network
    slow = SETUP._replace(latency=1e-3)
    assert exchange_ms(8, 4 * 10**8, slow) == pytest.approx(1.75 + 6.0)


def test_one_device():
    found = estimate(PARTS, SETUP, 1)
    assert found.compute == 4 * 320
    assert (found.exchange, found.optimizer, found.step) == (0, 2, 1282)
    assert found.tokens_per_s == pytest.approx(256 * 500 / 1.282)
    assert (found.efficiency, found.binds) == (1, "compute")


def test_the_exchange_overlaps_with_the_last_backward_except_for_the_embeddings():
    embeddings = exchange_ms(16, 40_000_000, SETUP)
    assert estimate(PARTS, SETUP, 16).exchange == pytest.approx(embeddings)
    slow = SETUP._replace(between=0.5e9)
    whole = exchange_ms(16, 100_000_000, slow)
    assert estimate(PARTS, slow, 16).exchange == pytest.approx(whole - 0.5 * PARTS.compute(16))
    assert estimate(PARTS, slow, 16).binds == "exchange"
    halved = slow._replace(element_bytes=2)
    assert estimate(PARTS, halved, 16).tokens_per_s > 1.5 * estimate(PARTS, slow, 16).tokens_per_s


def test_samples_cannot_be_divided():
    at_256, at_1024 = (estimate(PARTS, SETUP, n) for n in (256, 1024))
    assert (at_256.share, at_256.binds) == (1, SMALL_PASSES)
    assert (at_1024.share, at_1024.binds) == (1, "batch size: 768 idle")
    assert at_1024.tokens_per_s == at_256.tokens_per_s
    assert at_1024.efficiency == pytest.approx(at_256.efficiency / 4)
    assert estimate(PARTS, SETUP, 96).share == 3  # a device with 3 samples makes the others wait


def test_data():
    own = PARTS._replace(reading=10_000.0, tokenizing=1e6)
    for devices in (1, 8, 64):
        found = estimate(own, SETUP, devices)
        assert found.data == pytest.approx(1e3 * 256 / devices * 500 / 10_000)
        assert found.step == found.data  # reading is slower than computing, on every device
        assert found.binds == "data"
    text = SETUP._replace(text=True)
    assert [estimate(own, text, n).data for n in (1, 64)] == [128.0, 128.0]  # every process reads everything
    assert estimate(own, text, 1).binds == "compute"
    assert estimate(own, text, 64).tokens_per_s == pytest.approx(1e6)
    assert estimate(PARTS, text, 64).data == 0


def rows():
    stages = {"data": 1.0, "teacher": 100.0, "student": 50.0, "loss": 10.0, "backward": 160.0, "exchange": 0.0}
    for B in (1, 64):
        scaled = {name: ms * B / 64 for name, ms in stages.items()} | {"optimizer": 2.0}
        yield made("train_step", "cpu", Workload(B, 3, 512, 8, 4), median_ms=1.0, detail={
            "model": "tiny", "layout": "packed", "processes": 1, "stages_ms": scaled, "tokens": 500 * B,
            "gradient_elements": 25_000_000, "embedding_elements": 10_000_000,
        })  # fmt: skip
    for name, rate in (("tokenizer", 1e6), ("reading", 5e6)):
        yield made("data", name, detail={"model": "tiny", "tokens_per_s": rate})
    yield made("data", "loop", detail={"model": "tiny", "overhead": 0.01})


def test_table_and_plot(tmp_path, capsys):
    for record in rows():
        records.append(tmp_path / "rows.jsonl", record)
    arguments = ["scale", str(tmp_path / "rows.jsonl"), "--network", "ethernet", "--devices", "1", "1024"]
    main(arguments)
    text = capsys.readouterr().out
    assert text.startswith("Estimates, not measurements")
    assert "12.5 GB/s for a node" in text
    assert "tokenizing 1,000,000 tokens/s" in text
    one, many = (line.strip("| ").split(" | ") for line in text.splitlines()[-2:])
    expected = [f"{256 * 500 / 1.282:,.0f}", "100 %", "compute"]
    assert one == ["1", "256", "1280", "0", "2", "25.6", "1282", *expected, expected[0], expected[0]]
    assert many[:2] == ["1024", "1"]
    assert many[9] == "batch size: 768 idle"
    page = tmp_path / "scale.md"
    page.write_text("Before.\n<!-- scale:begin -->\nold\n<!-- scale:end -->\n")
    main([*arguments, "--update", str(page), "--plots", str(tmp_path / "plots")])
    assert text.strip() in page.read_text()
    assert "(plots/scale.png)" in page.read_text()
    assert (tmp_path / "plots/scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "carrier pigeon"], f"--network: expected {', '.join(NETWORKS)} or GB/s"),
        (["--inside", "-1"], "--inside"),
        (["--devices", "0"], "--devices"),
        (["--samples", "0"], "--samples"),
        (["--length", "99"], "S = 99"),
        (["--model", "tiny", "--device", "no such device"], "found none"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, arguments, message):
    for record in rows():
        records.append(tmp_path / "rows.jsonl", record)
    with pytest.raises(SystemExit):
        main(["scale", str(tmp_path / "rows.jsonl"), *arguments])
    assert message in capsys.readouterr().err
