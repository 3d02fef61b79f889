# Every target sets itself up: it makes .venv, installs the pinned torch and this package, and runs.
# A second run finds all of that in place.

PYTHON ?= python3
# Pinned. Under another one, which may bring gigabytes of GPU libraries: make test TORCH=torch==2.14.1 VENV=build/venv-2.14
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Processes that share the tests; each takes about a gigabyte.
JOBS ?= 2
PYTEST := -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: help demo test slow check lint format bench ratios sanitize soak compute-sanitizer packaging cuda mutants clean
.NOTPARALLEL:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

demo: $(INSTALLED)  ## distil a real teacher on real text, a few minutes on two cores
	$(BIN)/python -m examples.demo $(ARGS)

test: $(INSTALLED) lint  ## lint and most of the tests, three minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow and not packaging" $(ARGS)

slow: $(INSTALLED)  ## the tests that make test leaves out: all of Triton's interpreter, of the emulation, of compilers
	$(BIN)/python $(PYTEST) -m "slow and not packaging" $(ARGS)

check: test slow sanitize cuda packaging  ## everything, each test once

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measure all that a CPU can, in eight minutes; renew tables and plots in README and docs
	$(BIN)/python -m benchmarks cpu --update README.md docs/benchmarks.md docs/cpu.md --plots docs/plots $(ARGS)

ratios: $(INSTALLED)  ## guard ratios of time and memory between providers, within one run
	$(BIN)/python -m pytest benchmarks $(ARGS)

SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(INSTALLED)  ## the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED)
	MINILM_KERNELS_BUILD=native CXXFLAGS="-O1 -g $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(CURDIR)/$(BIN)/python $(PYTEST) -p no:cacheprovider tests/relation/backends/test_native_cpu.py -k "not peak_memory"

soak: $(INSTALLED)  ## kill small runs at their operations on files and continue them, five minutes
	$(BIN)/python -m tests.distill.soak $(ARGS)

compute-sanitizer: $(INSTALLED)  ## the CUDA kernels' tests under NVIDIA's compute-sanitizer, on a GPU
	for tool in memcheck racecheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -p no:cacheprovider tests/relation/backends/test_cuda_device.py || exit 1; \
	done

packaging: $(INSTALLED)  ## installs into new environments; other compilers, processors and Pythons
	$(BIN)/python $(PYTEST) --dist loadscope -m packaging -rs tests/packaging $(ARGS)

ARCHITECTURES := 80 86 89 90 100 120
cuda: $(INSTALLED)  ## compile all CUDA kernels of widths 16 and 8 for all GPUs, into build/cuda; needs no GPU
	for dtype in bfloat16 float16 float32; do \
		$(BIN)/python -m minilm_kernels precompile --cache build/cuda --dtype $$dtype \
			--widths 16,8 --arch $(ARCHITECTURES) || exit 1; \
	done

mutants: $(INSTALLED)  ## put a bug into a copy of the sources, one of a hundred at a time; the tests must find it
	$(BIN)/python -m tests.mutants $(ARGS)

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info minilm_kernels/*.so minilm_kernels/*.missing demo-output .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(INSTALLED): pyproject.toml setup.py $(wildcard build_support/*.py csrc/*/* csrc/*/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minilm_kernels needs Python 3.10 or later, this is %s; set PYTHON=" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@
