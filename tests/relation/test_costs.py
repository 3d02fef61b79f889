"""The order in which backend="auto" tries the backends, and the table that it follows."""

import json
import logging

import pytest
import torch

from benchmarks.static_cost import table
from minilm_kernels._choices import AUTO_BACKENDS
from minilm_kernels.relation import costs, dispatch
from minilm_kernels.relation.inputs import RelationInputs
from minilm_kernels.relation.masks import Mask

CALL = costs.Call(90, 132, "training", "bfloat16", 16, 512, 3, 0, 132)


def inputs(dtype=torch.bfloat16, pairs=((0, 0), (1, 1)), shape=(2, 100, 4)) -> RelationInputs:
    teacher, student = ([torch.empty(*shape, width, dtype=dtype, device="meta")] * 3 for width in (16, 8))
    return RelationInputs(teacher, student, pairs, Mask(shape[:2], torch.device("cpu")))


def test_cpu_tensors_keep_the_default_order():
    assert costs.order(inputs(), "training").backends == AUTO_BACKENDS


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "cuda"),
        ({"self_relations": 1, "heads": 4}, "triton"),  # a CUDA block per head would leave most multiprocessors idle
        ({"self_relations": 0, "cross_relations": 1}, "triton"),
        ({"self_relations": 0, "cross_relations": 1, "work": "rows gradient"}, "triton"),
        ({"work": "evaluation"}, "triton"),
        ({"architecture": 103}, "cuda"),  # as the newest architecture before it
    ],
)
def test_the_cheapest_backend_comes_first(changes, backend):
    order = costs._order(CALL._replace(**changes))
    assert order.backends[0] == backend
    assert sorted(order.backends) == sorted(AUTO_BACKENDS)
    assert order.backends[2:] == AUTO_BACKENDS[2:]
    assert order.reason.startswith("clocks per pair and multiprocessor (")


@pytest.mark.parametrize("changes", [{"architecture": 75}, {"dtype": "float8"}, {"width": 99}])
def test_without_a_row_the_default_order_stays(changes):
    order = costs._order(CALL._replace(**changes))
    assert order.backends == AUTO_BACKENDS
    assert "no row" in order.reason


def test_clocks_of_self_and_cross_relations_add_up(monkeypatch):
    rows = {
        (90, "self training", "bfloat16", 16, 512): costs.Row({"cuda": 1.0, "triton": 3.0}, ["cuda"], "static"),
        (90, "cross training", "bfloat16", 16, 512): costs.Row({"cuda": 6.0, "triton": 4.0}, [], "measured"),
    }
    monkeypatch.setattr(costs, "table", lambda: rows)
    order = costs._order.__wrapped__
    both = CALL._replace(self_relations=1, cross_relations=1)
    assert order(both).backends[0] == "cuda"  # 1 + 6 = 3 + 4: the default order decides
    assert order(both._replace(cross_relations=2)).backends[0] == "triton"
    assert order(both._replace(self_relations=2)).backends[0] == "cuda"
    assert order(both._replace(heads=66)).backends[0] == "triton"  # 2 + 6 > 3 + 4
    assert order(both).reason == "clocks per pair and multiprocessor (static and measured): cuda 7.000, triton 7.000"


def test_a_call_is_described_without_reading_values(monkeypatch):
    monkeypatch.setattr(costs, "_device", lambda index: (90, 132))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    call = costs._describe(inputs(pairs=((0, 0), (0, 1), (2, 2))), "evaluation")
    assert call == costs.Call(90, 132, "evaluation", "bfloat16", 16, 128, 2, 1, 8)
    assert costs._describe(inputs(torch.float64), "training") is None
    many = costs._describe(inputs(torch.float16, shape=(40, 10000, 12)), "training")
    assert (many.dtype, many.length, many.heads) == ("float16", 8192, 132)


def test_the_choice_and_its_reason_are_logged(monkeypatch, caplog):
    monkeypatch.setattr(costs, "order", lambda *_: costs.Order(("triton", "torch", "cpu", "cuda"), "torch is cheap"))
    with caplog.at_level(logging.DEBUG, "minilm_kernels.relation.dispatch"):
        chosen = dispatch.run("auto", inputs(), "training", lambda backend: backend)
    assert chosen is dispatch.MODULES["torch"]
    assert "backend torch serves a call (training); torch is cheap" in caplog.messages


def test_rows_of_the_table_are_sorted_and_complete(tmp_path):
    rows = json.loads(costs.FILE.read_text())
    table.write(tmp_path / "costs.json", rows)
    assert (tmp_path / "costs.json").read_text() == costs.FILE.read_text()
    assert len(costs.table()) == len(rows)
    for arch, kind, dtype, width, length in costs.table():
        assert arch in (80, 86, 89, 90, 100, 120)
        assert kind.split(" ", 1)[0] in ("self", "cross")
        assert kind.split(" ", 1)[1] in costs.Work.__args__
        assert dtype in ("bfloat16", "float16", "float32")
        assert width in costs.WIDTHS
        assert length in costs.LENGTHS


def test_measured_rows_replace_bounds_of_which_both_backends_were_measured():
    row = {"arch": 90, "kind": "self training", "dtype": "bfloat16", "width": 16, "length": 512, "source": "static"}
    rows = {table._key(row): row | {"clocks": {"cuda": 0.13, "triton": 0.14}, "per_head": ["cuda"]}}
    shape = {"B": 32, "A": 48, "S": 512, "d_t": 16, "d_s": 8, "relations": "qq,kk,vv", "mask": "none"}
    record = {"suite": "loss", "status": "ok", "mode": "full", "dtype": "bfloat16", "shape": shape}
    record |= {"pairs": 3 * 32 * 48 * 512**2, "median_ms": 1.0}
    table.add_measured(rows, [record | {"provider": "cuda"}], "sm_90")
    assert rows[table._key(row)]["source"] == "static"
    slower = record | {"provider": "triton", "median_ms": 2.0}
    table.add_measured(rows, [record | {"provider": "cuda"}, slower, record | {"provider": "eager"}], "sm_90")
    (found,) = rows.values()
    assert found["source"] == "measured"
    assert found["clocks"]["cuda"] == pytest.approx(1e-3 * 132 * 1.83e9 / record["pairs"], rel=1e-3)
    assert found["clocks"]["triton"] == pytest.approx(2 * found["clocks"]["cuda"], rel=1e-3)


@pytest.mark.slow
def test_a_part_of_the_table_is_what_the_command_makes():
    pytest.importorskip("triton", reason="its wheel brings the disassembler")
    listed = {table._key(row): row for row in json.loads(costs.FILE.read_text())}
    for relation, work in (("self", "training"), ("cross", "evaluation")):
        for row in table.static_rows("sm_90", "bfloat16", 16, (relation,), (work,), (512,)):
            if listed[table._key(row)]["source"] == "static":
                assert listed[table._key(row)]["clocks"] == pytest.approx(row["clocks"], rel=0.02)
