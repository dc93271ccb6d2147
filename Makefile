# The two commands of the README are `make quickstart` and `make test`. Each makes .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: quickstart test check format lint types contract proof sweep bench clean

quickstart: $(VENV)/.quickstart  ## several domains on one backbone, in minutes
	$(BIN)/onetrunk quickstart

test: $(VENV)/.dev  ## every test
	$(PYTEST) -n 2

check: $(VENV)/.dev lint types contract test  ## what a change must pass

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(VENV)/.dev
	$(BIN)/mypy

contract: $(VENV)/.dev
	$(BIN)/lint-imports

proof: $(VENV)/.dev  ## 10,000 kills of a writer, where `make test` has 500
	$(BIN)/python tests/bank/test_store_crash.py 10000 1 $$(mktemp -d)

sweep: $(VENV)/.dev  ## every family on timm's networks up to 10 M parameters; writes docs/support.md
	$(BIN)/python benchmarks/sweep.py --all

bench: $(VENV)/.dev  ## opening, loading, attaching, importing
	$(BIN)/onetrunk benchmark speed --only bank --backbone timm:resnet18 --out scratch/speed
	$(BIN)/python benchmarks/starting.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[quickstart]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
