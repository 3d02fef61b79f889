"""Runs the Python blocks of docs/integrations.md and the examples in the docstrings of the integrations."""

import doctest
import importlib

import pytest

from tests.test_examples import FLAGS, ROOT, TRAINERS, run_blocks

MODULES = sorted(path.stem for path in (ROOT / "minilm_kernels" / "integrations").glob("[a-z]*.py"))


def test_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(TRAINERS)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_have_examples_that_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"minilm_kernels.integrations.{name}")
    failed, attempted = doctest.testmod(module, optionflags=FLAGS)
    assert failed == 0
    assert attempted > 0
