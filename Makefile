# make run    measure the built-in corpus with the built-in model
# make test   the tests that are quick
# make check  format, lint, types, tests
# make bench  speed, memory and size, against doing without or doing it the usual way
# make census every architecture of transformers, measured as a tiny model against its own eager patterns
# Each installs what it needs into .venv first, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet -c constraints.txt

.PHONY: run test check bench census format lint types dictionary clean

run: .venv/.run-installed
	$(BIN)/attlas run flows/runs/demo.toml

test: .venv/.test-installed
	HF_HUB_OFFLINE=1 PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 $(BIN)/python -m pytest

check: format lint types test

# ratios in one run; BENCH='forward/*' chooses some
bench: .venv/.test-installed
	$(BIN)/python -m tests.benchmarks.bench $(BENCH)

# writes data/COVERAGE.md
census: .venv/.test-installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.census.census

format: .venv/.test-installed
	$(BIN)/ruff format --check .

lint: .venv/.test-installed
	$(BIN)/ruff check .

types: .venv/.test-installed
	$(BIN)/pyright

# torch in a step of its own: an extra that pulls it first may choose a build with gigabytes of CUDA
.venv/.torch-installed: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) torch==2.13.0
	touch $@

.venv/.run-installed: .venv/.torch-installed pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/.test-installed: .venv/.torch-installed pyproject.toml constraints.txt
	$(INSTALL) -e '.[test]'
	touch $@ .venv/.run-installed

# the data dictionary, from the catalogue
dictionary: .venv/.run-installed
	$(BIN)/python -m extract.dictionary > data/README.md

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
