# `make` alone lists the targets. PYTHON is the interpreter that makes .venv: make setup PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := smollm2-135m
PROMPT := What is gravity?
SOURCES := src tests examples

.DEFAULT_GOAL := help
.PHONY: help setup pull demo test parity lint types kernels clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

test: pull  ## set up, fetch the demo model, run the tests (make test PYTEST_ARGS=tests/cpu)
	$(BIN)/python -m pytest --ignore tests/kernels $(PYTEST_ARGS)
	@# Triton's interpreter is chosen for a whole process: its tests have one of their own.
	$(BIN)/python -m pytest tests/kernels

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
