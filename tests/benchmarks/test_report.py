"""The report is made from records: without records there is no table and no figure."""

import json
import re
from html.parser import HTMLParser

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import records
from benchmarks.measure.workload import Workload
from benchmarks.reporting import figures
from benchmarks.reporting.sections import SECTIONS, markdown
from benchmarks.roofline import NAME


def made(suite, provider, workload=None, mode="full", detail=None, **measured):
    """A record with the keys that the suites write."""
    workload = workload or Workload(2, 3, 64, 8, 4)
    measured = {"status": "ok", "pairs": workload.pairs, "detail": detail or {}, **measured}
    return records.new(suite, provider, workload, mode, **measured)


def timed(provider, median, **options):
    return made(
        "loss",
        provider,
        median_ms=median,
        p20_ms=median,
        p80_ms=median,
        peak_bytes=2**20,
        error_value=1e-7,
        error_grad=2e-7,
        **options,
    )


def lengths(provider, factor):
    found = [timed(provider, factor * S, workload=Workload(2, 3, S, 8, 4)) for S in (32, 64, 128)]
    return [{**record, "run": "another"} for record in found]


LOSS = [timed(NAME, 1.0), timed("eager", 8.125), timed("cpu", 2.0), made("loss", "flex", status="oom")]
MEMORY = [
    made("memory", name, Workload(B, 3, S, 8, 4), peak_bytes=B * S * factor * 2**17, saved_bytes=3 * 2**20)
    for name, factor in (("eager", 64), ("cpu", 1))
    for B, S in ((1, 32), (1, 64), (2, 64), (4, 64))
]
BATCH = [
    made("memory", name, Workload(B, 3, 64, 8, 4), detail={"budget_bytes": 2**30}, peak_bytes=2**29)
    for name, B in (("eager", 3), ("cpu", 251))
]
ACCURACY = [
    made("accuracy", name, error_value=error, error_grad=1e-6, detail=detail)
    for name in ("eager", "cpu")
    for error, detail in (
        (2e-7, {"allowed_value": 1e-6, "allowed_grad": 1e-5}),
        (3e-6, {"kl": 1e-2, "reduction": "sequence"}),
        (4e-4, {"kl": 1e-5, "reduction": "sequence", "negative": True}),
    )
]
TRAIN_STEP = [
    made("train_step", "cpu", Workload(B, 3, S, 8, 4), median_ms=1.1 * ms, runs=6, error_grad=2e-6, peak_bytes=2**30,
         detail={
        "model": "tiny", "layout": layout, "best_ms": ms, "processor_ms": 2 * ms, "tokens": 1000, "loss_share": 0.07,
        "tokens_per_s": 1e6 / ms, "mfu": 0.31, "mfu_of": "measured matrix product", "recipe_hours": 17.5,
        "stages_ms": {"data": 1.0, "teacher": 40.0, "student": 20.0, "loss": 7.0, "backward": 30.0, "exchange": 0.0,
                      "optimizer": 3.0},
    })
    for layout, B, S, ms in (("dense", 4, 512, 100.0), ("packed", 4, 512, 80.0), ("packed", 1, 2048, 88.0))
]  # fmt: skip
DATA = [
    made("data", "loop", median_ms=100.0, detail={
        "model": "tiny", "best_ms": 102.0, "prepared_ms": 100.0, "overhead": 0.02, "median_overhead": 0.025,
        "processor_overhead": 0.04,
    }),
    *(
        made("data", name, median_ms=1.0, error_value=0.0, peak_bytes=peak, detail={
            "model": "tiny", "tokens_per_s": rate, "tokens_per_processor_s": rate / 2,
        })
        for name, rate, peak in (("tokenizer", 1e6, None), ("prepare", 0.9e6, 400 * 2**20), ("reading", 5e6, None))
    ),
]  # fmt: skip
INFERENCE = [
    made("inference", name, median_ms=median, error_value=1e-6, detail={
        "published_speedup": published, "published_million_parameters": None, "parameters": 22_000_000, "tokens": 128,
    })
    for name, median, published in (("12x768", 106.0, 1.0), ("6x384", 20.0, 5.3))
]  # fmt: skip
ABLATION = [
    made("ablation", name, median_ms=median, pairs=10**6, detail={"predicted": "2 ×", "relative_to": base})
    for name, median, base in (("unchanged", 0.25, None), ("vectors", 1.0, "unchanged"), ("AVX2", 2.5, "vectors"))
]
ALL = [*LOSS, *lengths("torch", 2.0), *MEMORY, *BATCH, *ACCURACY, *TRAIN_STEP, *DATA, *INFERENCE, *ABLATION]
EVERY = {"loss", "cases", "memory", "batch", "accuracy", "train_step", "data", "inference", "ablation"}


def cells(table):
    return {line[0]: list(line[1:]) for line in table.lines}


def test_sections_show_the_values_of_the_records():
    assert set(SECTIONS) == set(markdown(ALL)) == EVERY
    (loss,) = SECTIONS["loss"].tables(ALL)
    assert cells(loss)["`cpu`"][:4] == ["2", f"{2e6 / (2 * 3 * 64**2):.3g}", "4.1 ×", "1.0"]
    assert cells(loss)["`flex`"][0] == "oom"
    assert NAME not in str(loss)
    (cases,) = SECTIONS["cases"].tables(ALL)
    assert [line[4] for line in cases.lines] == ["4.00", "2.00", "1.00"]
    (memory,) = SECTIONS["memory"].tables(ALL)
    assert cells(memory)["`eager`"][0] == "256 (3.0)"
    (batch,) = SECTIONS["batch"].tables(ALL)
    assert cells(batch)["`cpu`"] == ["251", "512"]
    worst, small = SECTIONS["accuracy"].tables(ALL)
    assert cells(worst)["`cpu`"] == ["float32", "1 of 1", "2e-07", "1e-06", "0.20"]
    assert cells(small)["1e-05"] == ["4e-04 (negative)"] * 2
    stages, rates = (cells(table) for table in SECTIONS["train_step"].tables(ALL))
    assert stages["dense, S = 512"] == ["`cpu`", "4", "100", "200", "1", "40", "20", "7", "30", "0", "3"]
    assert [line[3] for line in rates.values()] == ["1.25 (1.25)", "1.00 (1.00)", "1.10 (1.10)"]
    assert rates["packed, S = 2048"][4:] == ["7 %", "31 %", "17.5", "1024", "2e-06"]
    loop, parts = SECTIONS["data"].tables(ALL)
    assert cells(loop)["tiny"] == ["2 × 64", "102", "100", "2.0%", "2.5%", "4.0%"]
    assert cells(parts)["prepare"] == ["900000", "0.90", "450000", "0.90", "400", "0 %"]
    (inference,) = SECTIONS["inference"].tables(ALL)
    assert cells(inference)["6 × 384"][1:3] == ["5.3 ×", "5.3 ×"]
    (ablation,) = SECTIONS["ablation"].tables(ALL)
    assert [line[2] for line in ablation.lines] == ["0.25", "4.00 ×", "2.50 ×"]


@pytest.mark.parametrize("name", sorted(EVERY))
def test_no_records_no_table(name):
    assert SECTIONS[name].tables([]) == []


@pytest.mark.parametrize("name", figures.FIGURES)
def test_no_records_no_figure(name):
    assert figures.draw(name, []) is None
    assert figures.draw(name, INFERENCE) is None
    broken = [{**record, "status": "oom"} for record in ALL]
    assert figures.draw(name, broken) is None
    assert figures.svg(figures.draw(name, ALL)) == figures.svg(figures.draw(name, ALL))  # equal records, equal text


def test_figures_draw_every_provider_that_has_records():
    for name, providers in (("roofline", {"eager", "cpu"}), ("memory", {"eager", "cpu"}), ("time", {"torch"})):
        text = figures.svg(figures.draw(name, ALL))
        assert {p for p in ("eager", "cpu", "torch", "sdpa") if f">{p}</text>" in text} == providers, name
    assert ">251</text>" in figures.svg(figures.draw("batch", ALL))


class _Page(HTMLParser):
    VOID = ("meta", "br", "img", "link", "path", "use", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.outside.append(value)
            if name == "id":
                self.ids.add(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_holds_its_records(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in ALL))
    main(["report", str(file), "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == page.outside == []
    assert page.ids >= EVERY
    assert text.count("<svg") == len(figures.FIGURES)
    shown = re.search(r"<pre>(.*)</pre>", text, re.DOTALL)[1].replace("&quot;", '"')
    assert [json.loads(line) for line in shown.splitlines()] == json.loads(json.dumps(ALL))


def test_update_replaces_sections_and_links_plots(tmp_path):
    (tmp_path / "records").mkdir()
    for record in LOSS:
        records.append(tmp_path / "records" / "a.jsonl", record)
    guide = tmp_path / "guide.md"
    guide.write_text(
        "Before.\n<!-- loss:begin -->\nold\n<!-- loss:end -->\n<!-- inference:begin -->\nkept\n<!-- inference:end -->\n"
    )
    arguments = [
        "report",
        str(tmp_path / "records"),
        "--plots",
        str(tmp_path / "docs" / "plots"),
        "--update",
        str(guide),
    ]
    main(arguments)
    text = guide.read_text()
    assert "old" not in text
    assert "kept" in text
    (link,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")
    main(arguments)
    assert guide.read_text() == text
    guide.write_text("no markers")
    with pytest.raises(SystemExit):
        main(arguments)


def test_committed_results_are_what_the_guides_show(capsys):
    """README and docs show exactly the tables of the committed records."""
    main(["report"])
    printed = capsys.readouterr().out
    for name, text in markdown(records.read([records.RESULTS])).items():
        assert text in printed
        for guide in ("README.md", "docs/benchmarks.md", "docs/cpu.md"):
            shown = (records.RESULTS.parents[1] / guide).read_text(encoding="utf-8")
            if f"<!-- {name}:begin -->" in shown:
                assert text in shown
