# `make` alone lists the targets. PYTHON is the interpreter that makes .venv: make setup PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := smollm2-135m
PROMPT := What is gravity?
SOURCES := src tests examples
# A folder of tests is a process: Triton's interpreter, which tests/kernels runs, is chosen for a whole process.
SUITES := $(patsubst tests/%/,%,$(sort $(dir $(wildcard tests/*/test_*.py))))

.DEFAULT_GOAL := help
.PHONY: help setup pull demo train-demo test parity lint types kernels clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## create .venv and install everything into it (again only when the requirements change)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "hayate needs Python 3.10 or later; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

pull: $(READY)  ## fetch the demo model, once
	$(BIN)/hayate pull $(MODEL)

demo: pull  ## set up, fetch the demo model, stream an answer
	$(BIN)/hayate generate --model $(MODEL) --chat --prompt "$(PROMPT)" --max-tokens 120

train-demo: $(READY)  ## train a small mixture of experts on books (minutes on two cores), generate from it, plot it
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/train/demo.sh runs/train-demo

test: pull  ## set up, fetch the demo model, run the tests (make test-cpu PYTEST_ARGS="-k cli" for some)
	@# Two suites at a time, the longest first, with a thread each; a suite's output comes when it ends.
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target \
		test-kernels $(patsubst %,test-%,$(filter-out kernels,$(SUITES)))

test-%: $(READY)
	MAKEFLAGS= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/$* $(PYTEST_ARGS)

parity: $(READY)  ## print the table of logits against transformers, every architecture
	$(BIN)/python -m tests.parity.compare

lint: $(READY)  ## check style
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(READY)  ## check types
	$(BIN)/mypy

kernels: $(READY)  ## compile every GPU kernel for sm_80 to sm_120; needs no GPU
	$(BIN)/python -m hayate.bench.compile_kernels

clean:  ## remove .venv and caches (not the model)
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache .mypy_cache
