"""The list of mutants."""

import re
import shlex
import subprocess
import sys

import pytest

from .__main__ import MUTANTS, ROOT, misfit


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_fits_the_sources(file):
    assert [problem for mutant in MUTANTS if mutant.file == file and (problem := misfit(mutant))] == []


@pytest.mark.slow
def test_every_mutant_names_tests_that_exist():
    # The packages of tests/integrations are not in every environment.
    strings = {mutant.tests for mutant in MUTANTS if "tests/integrations" not in mutant.tests}
    arguments = {tests: shlex.split(tests) for tests in strings}
    files = {word for words in arguments.values() for word in words if word.endswith(".py")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *sorted(files)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    names = [line.lower() for line in result.stdout.splitlines() if "::" in line]
    missing = []
    for tests, words in arguments.items():
        chosen = [name for name in names if name.startswith(tuple(words))]
        selection = words[words.index("-k") + 1] if "-k" in words else ""
        wanted = set(re.findall(r"[\w-]+", selection.lower())) - {"and", "or", "not"} or {""}
        missing += [f"{tests}: {word}" for word in sorted(wanted) if not any(word in name for name in chosen)]
    assert missing == []
