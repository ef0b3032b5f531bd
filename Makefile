# make demo: see it work. make test: lint, types and tests. make test-all: also the slow tests. All create .venv on first use.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VERSION ?= 2.13.0
WORKERS ?= 2

.PHONY: demo test test-all lint docs opinfo test-torch bench clean

demo: $(VENV)/.installed
	$(BIN)/lz demo

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not gpu"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

opinfo: $(VENV)/.installed-test
	$(BIN)/python benchmarks/opinfo.py

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/models.py --device cpu

# The same tests on another torch, in an environment of its own (may download gigabytes).
test-torch:
	$(MAKE) test TORCH=torch==$(VERSION) VENV=.venv-torch-$(VERSION)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, by itself: the other requirements must not pull in another build of it.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf build $(VENV) .venv-torch-* .mypy_cache .pytest_cache .ruff_cache
