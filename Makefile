# Every target first creates .venv and installs the pinned torch and this package into it, unless that has been done.

PYTHON ?= python3
# To test another version of torch (it may download gigabytes of GPU libraries):
# make test TORCH=torch==2.14.1 VENV=build/venv-2.14
TORCH := torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INTEGRATIONS := $(VENV)/.integrations

# Processes that run the tests side by side; each takes about a gigabyte of memory.
JOBS ?= 2
PYTEST := -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: help demo test slow nightly integrations check lint format docs bench ratios sanitize soak compute-sanitizer packaging wheels cuda
.PHONY: mutants random architectures clean
.NOTPARALLEL:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

demo: $(INSTALLED)  ## distill a small teacher on real text; a few minutes on two cores
	$(BIN)/python -m examples.demo $(ARGS)

test: $(INSTALLED) lint  ## lint, then every test that is neither slow nor packaging; about four minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow and not packaging" $(ARGS)

slow: $(INSTALLED)  ## the slow tests: Triton's interpreter, emulated CUDA kernels, torch.compile, several processes
	$(BIN)/python $(PYTEST) -m "slow and not packaging and not nightly" $(ARGS)

nightly: $(INSTALLED)  ## the tests that make check leaves to the night: more GPUs and seeds
	$(BIN)/python $(PYTEST) -m nightly $(ARGS)

integrations: $(INTEGRATIONS)  ## install the trainers of other packages and test with them, the examples included
	$(BIN)/python $(PYTEST) tests/integrations $(ARGS)

check: test slow integrations docs sanitize cuda packaging  ## everything that continuous integration runs, each test once

CXX_CODE := csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh'
lint: $(INSTALLED)  ## ruff, mypy, typos and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/typos
	find $(CXX_CODE) | xargs $(BIN)/clang-format --dry-run --Werror

format: $(INSTALLED)  ## format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find $(CXX_CODE) | xargs $(BIN)/clang-format -i

docs: $(INSTALLED)  ## build the documentation into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(INSTALLED)  ## run all CPU benchmarks in ten minutes; update the tables and plots of README and docs
	$(BIN)/python -m benchmarks cpu --update README.md docs/benchmarks.md docs/cpu.md --plots docs/plots $(ARGS)

ratios: $(INSTALLED)  ## check ratios of time and memory between providers that are measured in one run
	$(BIN)/python -m pytest benchmarks $(ARGS)

SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(INSTALLED)  ## the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED)
	MINILM_KERNELS_BUILD=native CXXFLAGS="-O1 -g $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)
	cp -r tests pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(abspath $(BIN))/python $(PYTEST) -p no:cacheprovider tests/relation/backends/test_native_cpu.py -k "not peak_memory"

soak: $(INSTALLED)  ## kill small distillation runs at their file operations and resume them; five minutes
	$(BIN)/python -m tests.distill.soak $(ARGS)

compute-sanitizer: $(INSTALLED)  ## the CUDA kernels' tests under NVIDIA's compute-sanitizer; needs a GPU
	for tool in memcheck racecheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -p no:cacheprovider tests/relation/backends/test_cuda_device.py || exit 1; \
	done

packaging: $(INSTALLED)  ## install into new environments; test other compilers, processors and Pythons
	$(BIN)/python $(PYTEST) --dist loadscope -m packaging -rs tests/packaging $(ARGS)

WHEELS := build/wheels
wheels: $(INSTALLED)  ## build the sdist and the manylinux wheel into dist/, and test the wheel in an empty environment
	rm -rf $(WHEELS) dist
	MINILM_KERNELS_BUILD=native $(BIN)/python -m build --no-isolation --outdir $(WHEELS) .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude libtorch_cpu.so \
		--wheel-dir dist $(WHEELS)/*-abi3-linux_*.whl
	cp $(WHEELS)/*.tar.gz dist
	$(PYTHON) -m venv $(WHEELS)/venv
	$(WHEELS)/venv/bin/python -m pip install --quiet $(TORCH) dist/*-abi3-manylinux_*.whl
	env -u PYTHONPATH $(WHEELS)/venv/bin/python tests/packaging/loss_check.py cpu

ARCHITECTURES := 80 86 89 90 100 120
cuda: $(INSTALLED)  ## compile the CUDA kernels of head widths 16 and 8 for all GPUs into build/cuda; needs no GPU
	printf '%s\n' bfloat16 float16 float32 | xargs -P $(JOBS) -I DTYPE \
		$(BIN)/python -m minilm_kernels precompile --cache build/cuda --dtype DTYPE --widths 16,8 --arch $(ARCHITECTURES)

random: $(INSTALLED)  ## 100 000 random calls against float64, over emulation, interpreter and CPU backends; twenty minutes
	$(BIN)/python -m tests.relation.random_cases --jobs $(JOBS) $(ARGS)

mutants: $(INSTALLED)  ## put bugs into copies of the sources, one at a time; the tests must find each
	$(BIN)/python -m tests.mutants $(ARGS)

architectures: $(INSTALLED)  ## check every model type of transformers; update docs/architectures.md; twenty minutes
	$(BIN)/python -m tests.architectures --jobs $(JOBS) --update docs/architectures.md $(ARGS)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info minilm_kernels/*.so minilm_kernels/*.missing demo-output .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks

$(INSTALLED): pyproject.toml setup.py $(wildcard build_support/*.py csrc/*/* csrc/*/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "minilm_kernels needs Python 3.10 or later, this is %s; set PYTHON=" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

$(INTEGRATIONS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet $(TORCH) --editable ".[integrations]"
	@touch $@
