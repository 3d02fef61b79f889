"""The table of the demo contains the given results."""

from examples.demo.report import table

BEFORE = {"model": "before", "eval_kl": 2.0, "bbc_accuracy": 0.5, "lee_r": -0.25}
AFTER = {"model": "seed 3", "eval_kl": 0.5, "bbc_accuracy": 0.75, "lee_r": 0.125, "training_seconds": 61.6}


def cells(text):
    return {line[0]: line[1:] for line in ([c.strip() for c in row.strip("|").split("|")] for row in text.splitlines())}


def test_table_holds_the_rows():
    lines = cells(table([BEFORE, AFTER]))
    assert lines[""] == ["before", "seed 3"]
    assert lines["eval relation KL"] == ["2.000", "0.500 (0.25 ×)"]
    assert lines["BBC accuracy"] == ["0.500", "0.750"]
    assert lines["Lee r"] == ["-0.250", "0.125"]
    assert lines["training, s"] == ["–", "62"]


def test_table_is_aligned_markdown():
    lines = table([BEFORE, AFTER, {"model": "a much longer title"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == set("|-: ")
