# make demo and make test do all the set-up on a fresh machine. Needs Python 3.10 to 3.13 with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests pin torch; a user installs the build that fits his card (see README.md).
TORCH ?= torch==2.13.0

.PHONY: demo test test-all test-gpu lint bench clean

demo: $(INSTALLED)
	$(BIN)/accelerate launch examples/phi3_dolly.py

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -s tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/core_speed.py

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" "$(TORCH)"
	touch $@

clean:
	rm -rf $(VENV) outputs wandb .pytest_cache .mypy_cache .ruff_cache .hypothesis
