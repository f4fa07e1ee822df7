# Everything sets itself up: a Python 3.11 or newer, a C/C++ compiler and make are all that is needed.

MODEL ?= tiny
PROMPT ?= Tell me about llama2
export MODEL PROMPT

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: run test test-all check format bench clean

run: $(VENV)/.installed
	@$(BIN)/llamacli -m "$$MODEL" "$$PROMPT" </dev/null

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m ''

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.startup --model "$$MODEL"
	$(BIN)/python -m benchmarks.throughput --model "$$MODEL"
	$(BIN)/python -m benchmarks.tuning --model "$$MODEL"
	$(BIN)/python -m benchmarks.serving --model "$$MODEL"
	$(BIN)/python -m benchmarks.prefixes --model "$$MODEL"
	$(BIN)/python -m benchmarks.transfer
	$(BIN)/python -m benchmarks.listing
	$(BIN)/python -m benchmarks.http_cost
	$(BIN)/python -m benchmarks.rehearsal
	$(BIN)/python -m benchmarks.batching --model "$$MODEL"
	$(BIN)/python -m benchmarks.parts --model "$$MODEL"
	$(BIN)/python -m benchmarks.sessions --model "$$MODEL"
	$(BIN)/python -m benchmarks.speculation --model "$$MODEL"

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first time this compiles llama.cpp for this machine, which takes a few minutes. pip keeps the result.
$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "llamacli needs Python 3.11 or newer: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing; compiling llama.cpp takes a few minutes the first time." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . >&2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' >&2
	@touch $@
