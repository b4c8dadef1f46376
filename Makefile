# make run      measure the built-in corpus with the built-in model
# make test     the tests that are quick
# make cover    the same, and how much of the code they reach
# make check    format, lint, types, tests
# make slow     the tests that take longer, or a browser
# make exhaustive  every case, damage and moment of which the other tests see some: half an hour, before a release
# make lowest   a part of the quick tests on the lowest versions that pyproject.toml admits
# make bench    speed, memory and size, against doing without or doing it the usual way
# make soak     an hour of a schedule on a flaky object store, with a growing corpus, new checkpoints and kills
# make census   every architecture of transformers, measured as a tiny model against its own eager patterns
# make gpu      what needs a GPU, tests and benchmark, with the packages that GPU_PYTHON has; installs nothing
# make hooks    format, lint and types at every commit
# Each installs what it needs into .venv first, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
PIP := -m pip --disable-pip-version-check
INSTALL := $(BIN)/python $(PIP) install --quiet -c constraints.txt
# a process for each core, each computing on one thread
ENVIRONMENT := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
# what touches most of the libraries; LOWEST_TESTS='tests/analysis tests/flows' for more
LOWEST_TESTS ?= $(addprefix tests/analysis/test_,answers.py compare.py dataset.py export.py hostile_sql.py query.py report.py verify.py) \
	$(addprefix tests/extract/test_,corpus.py encoder.py heads.py run.py) $(addprefix tests/flows/test_,api.py cli.py measure.py view.py)
GPU_PYTHON ?= python3
GPU_OUT := $(or $(OUT),data/gpu)
ON_GPU := PYTHONPATH=. HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONUNBUFFERED=1 $(GPU_PYTHON)
PYTEST := -m pytest -n logical --maxprocesses 8 $(PYTEST_OPTIONS)

.PHONY: run test cover slow exhaustive lowest check bench census gpu gpu-bench gpu-kit gpu-rehearsal soak format lint types hooks compiled compiled-lowest dictionary clean

run: .venv/.run-installed
	$(BIN)/attlas run flows/runs/demo.toml

test: .venv/.test-installed
	$(ENVIRONMENT) $(BIN)/python $(PYTEST)

cover: .venv/.test-installed
	$(ENVIRONMENT) $(BIN)/python $(PYTEST) --cov --cov-fail-under=94 --cov-report=term:skip-covered

slow: .venv/.test-installed
	$(ENVIRONMENT) $(BIN)/python $(PYTEST) -m '(slow or browser) and not exhaustive'

exhaustive: .venv/.test-installed
	$(ENVIRONMENT) $(BIN)/python $(PYTEST) -m exhaustive

check: format lint types test

# ratios in one run; BENCH='forward/*' chooses some
bench: .venv/.test-installed
	$(BIN)/python -m tests.benchmarks.bench $(BENCH)

soak: .venv/.test-installed
	$(BIN)/python -m tests.soak --minutes 60

# writes data/COVERAGE.md
census: .venv/.test-installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.census.census

# in under four minutes; leaves gpu.json and gpu.txt
gpu:
	$(ON_GPU) -m tests.gpu --out $(GPU_OUT) $(GPU_OPTIONS)

# GPU_OPTIONS='--only forward/*' chooses some, '--sweep' tries tile sizes
gpu-bench:
	$(ON_GPU) -m tests.gpu.bench --out $(GPU_OUT) $(GPU_OPTIONS)

# .gpu-kit: the demo model, to carry to a machine without its package
gpu-kit: .venv/.test-installed
	$(BIN)/python -m tests.gpu.kit

# the code of `make gpu` on a CPU, with tiny sizes, Triton's interpreter and only the packages of a bare machine
gpu-rehearsal: .venv/.test-installed gpu-kit
	ATTLAS_GPU_DEVICE=cpu PYTHONPATH=tests/gpu/bare:. $(BIN)/python -m tests.gpu --seconds 1800 --copies 1 --out $(GPU_OUT)

format: .venv/.dev-installed
	$(BIN)/ruff format --check .

lint: .venv/.dev-installed
	$(BIN)/ruff check .

types: .venv/.test-installed .venv/.dev-installed
	$(BIN)/pyright

hooks: .venv/.dev-installed
	$(BIN)/pre-commit install --hook-type pre-commit --hook-type pre-push

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

.venv/.dev-installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install --quiet -c constraints.txt ruff pyright pre-commit
	touch $@

# the torch of .venv, by hard links
.venv-lowest/.installed: .venv/.torch-installed pyproject.toml tests/lowest.py
	$(PYTHON) -m venv --clear .venv-lowest
	cp -al .venv/lib/python3*/site-packages/torch* .venv/lib/python3*/site-packages/functorch .venv-lowest/lib/python3*/site-packages/
	$(PYTHON) tests/lowest.py > .venv-lowest/lowest.txt
	$(LOWEST)/python $(PIP) install --quiet -c .venv-lowest/lowest.txt -e . pytest pytest-xdist hypothesis beartype obstore pandas psutil
	touch $@

# what the first test would otherwise wait for
compiled: .venv/.test-installed
	$(BIN)/python -m tests.compile_engine

compiled-lowest: .venv-lowest/.installed
	$(LOWEST)/python -m tests.compile_engine

# older libraries warn of newer ones beneath them: warnings are no errors here
lowest: .venv-lowest/.installed
	$(ENVIRONMENT) $(LOWEST)/python $(PYTEST) -o filterwarnings= \
		-k 'not image' $(LOWEST_TESTS)

# the data dictionary, from the catalogue
dictionary: .venv/.run-installed
	$(BIN)/python -m attlas.extract.dictionary > data/README.md

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
