"""The list of mutants."""

import pytest

from .__main__ import MUTANTS, misfit


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_mutant_fits_the_sources(file):
    assert [problem for mutant in MUTANTS if mutant.file == file and (problem := misfit(mutant))] == []
