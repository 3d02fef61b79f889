"""Runs the examples of the public docstrings and the Python blocks of README.md and docs/*.md.

The blocks of a page share one namespace, as the cells of a notebook do. A block of text that follows a Python block
is the output printed so far. Two HTML comments before a block are read:

    <!-- setup: CODE -->        runs CODE first; `tiny_models()` returns a teacher, a student and a list of batches
    <!-- not run: REASON -->    the block is compiled, but not run
"""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch

import minilm_kernels
from minilm_kernels import distill

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = ROOT / "docs" / "integrations.md"  # tests/integrations runs its blocks, which need other packages
PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {TRAINERS})]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(
    r"(?:^<!-- (?P<kind>setup|not run): (?P<comment>(?:(?!-->).)*)-->\n+)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
PUBLIC = [(minilm_kernels, name) for name in minilm_kernels.__all__] + [(distill, name) for name in distill.__all__]


def tiny_models():
    """A teacher with 12 layers, a student with 2, and two batches, so that examples are fast and need no download."""
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 99, "num_attention_heads": 12, "intermediate_size": 96}
    teacher = BertModel(BertConfig(hidden_size=96, num_hidden_layers=12, **sizes))
    student = BertModel(BertConfig(hidden_size=48, num_hidden_layers=2, **sizes))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    batches = [{"input_ids": torch.randint(99, (2, 8)), "attention_mask": mask} for _ in range(2)]
    return teacher, student, batches


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{m.__name__}.{n}" for m, n in PUBLIC])
def test_public_docstrings_have_examples_that_run(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = getattr(module, name)
    if not callable(public):
        pytest.skip("a constant has no docstring")
    tests = doctest.DocTestFinder(exclude_empty=False).find(public, name, globs={})
    assert any(test.name == name and test.examples for test in tests), f"the docstring of {name} has no example"
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in tests:
        runner.run(test, out=output.write)
    assert not runner.summarize(verbose=False).failed, output.getvalue()


def test_scripts_are_short():
    for script in (ROOT / "examples").glob("*.py"):
        most = 80 if script.name == "seq2seq_generation.py" else 60  # it also generates
        assert len(script.read_text(encoding="utf-8").splitlines()) <= most, script.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def run_blocks(page: Path) -> None:
    """Runs the Python blocks of a page and compares what they print with the blocks of text after them."""
    text = page.read_text(encoding="utf-8")
    namespace = {"__name__": "__main__", "tiny_models": tiny_models}
    printed = io.StringIO()
    found = list(BLOCK.finditer(text))
    assert len(found) == text.count("```python"), "a Python block is indented or not closed"
    for block in found:
        line = text.count("\n", 0, block.start("code"))
        code = compile("\n" * line + block["code"], str(page), "exec")
        if block["kind"] == "not run":
            continue
        with contextlib.redirect_stdout(printed):
            if block["kind"] == "setup":
                exec(block["comment"], namespace)
            exec(code, namespace)
        if block["output"] is not None:
            same = doctest.OutputChecker().check_output(block["output"], printed.getvalue(), FLAGS)
            assert same, f"{page.name}:{line}: printed\n{printed.getvalue()}"
            printed.seek(0)
            printed.truncate()


def test_headline_figures_stand_in_the_table():
    """The figures on the first screen of README.md are those of the first table between the markers."""
    head, _, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- loss:begin -->")
    first = rest[rest.index("| provider") :].partition("\n\n")[0]
    header, _, *rows = ([cell.strip(" `") for cell in line.split("|")] for line in first.splitlines())
    table = {row[1]: dict(zip(header, row, strict=True)) for row in rows}
    for provider in ("cpu", "torch.compile", "eager"):
        time, memory = (next(table[provider][key] for key in header if key.startswith(word)) for word in ("ms", "peak"))
        assert f"{float(time):.2g} ms" in head or f"{time} ms" in head, f"{provider}: {time} ms"
        assert f"{memory} MiB" in head, f"{provider}: {memory} MiB"
