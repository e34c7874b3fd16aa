# make train [DATASET=omniglot] [ARGS="--seed 1"] | make test | make setup | make bench | make bench-report | make lint
PYTHON ?= python3
DATASET ?= glyphs
ARGS ?=
# Processes that share the quick tests, with one thread each.
WORKERS ?= auto
BIN := .venv/bin
# Waiting threads spin for a moment, then sleep (see mcdi_fast/environment.py); exported for the tests too.
export GOMP_SPINCOUNT ?= 100000

.PHONY: train test slow bench bench-report lint setup clean

train: setup
	$(BIN)/python -m mcdi_fast.train --dataset $(DATASET) $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

bench: setup
	$(BIN)/python -m pytest bench/ -q --benchmark-only --benchmark-json=bench/results/$$(date +%F)-$$($(BIN)/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")').json --benchmark-columns=min,median,iqr,rounds $(ARGS)

bench-report: setup
	$(BIN)/python bench/report.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
