# Every target sets itself up: it makes .venv, installs the pinned torch and this package, and runs.
# A second run finds all of that in place.

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint format bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

demo: $(INSTALLED)  ## distil a real teacher on real text, a few minutes on two cores
	$(BIN)/python -m minilm_kernels.demo $(ARGS)

test: $(INSTALLED) lint  ## lint and the whole test suite
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## loss and gradient: time, memory and error of every provider
	$(BIN)/python -m benchmarks run --suite loss $(ARGS)

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(INSTALLED): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minilm_kernels needs Python 3.10 or later, this is %s; set PYTHON=" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
