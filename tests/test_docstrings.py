"""The examples in the docstrings of the extractor, the students and the distillation loop."""

import doctest
import importlib

import pytest

MODULES = [
    "_extras",
    "distill.config",
    "distill.loop",
    "distill.preparation",
    "distill.optimizer",
    "integrations.relation_term",
    "losses",
    "presets",
    "qkv",
    "recording",
    "students",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"minilm_kernels.{name}")
    failed, attempted = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert attempted > 0
