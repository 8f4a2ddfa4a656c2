# Two commands do all the set-up: `make build` and `make test`. `make help` lists the rest.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INPUT ?=
OUT ?= $(if $(INPUT),my-db,quickstart-db)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install build test test-fast lint format types check bench flink-jars flink-up flink-down flink-test prism kill-test soak-test clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make the virtual environment and install the project into it.

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV) || exit 1; }
	@echo "installing retrodb and what it needs (torch alone is several GB: a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

build: $(STAMP)  ## Build a database: the quickstart one, or INPUT="a.jsonl.gz b/" OUT=my-db ARGS="--metric ip".
ifeq ($(strip $(INPUT)),)
	@$(BIN)/python -m retrodb.corpus.quickstart quickstart-corpus.jsonl
	@$(BIN)/retrodb build quickstart-corpus.jsonl --out $(OUT) $(ARGS)
else
	@$(BIN)/retrodb build $(INPUT) --out $(OUT) $(ARGS)
endif

# One process more than there are cores: some tests wait for others' retries.
TEST_PROCESSES = $$($(BIN)/python -c 'import os; print(min(4, os.cpu_count() + 1))')

test: $(STAMP)  ## Run all tests.
	@$(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)  ## Run the tests that build no database.
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(STAMP)  ## Check formatting and style.
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

format: $(STAMP)  ## Format, and fix what can be fixed.
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP)  ## Check types.
	@rm -rf build/types && mkdir -p build/types/retrodb  # the package as it is installed: else retrodb.pipelines is nothing that mypy knows
	@ln -sfn $(CURDIR)/retrodb/* $(CURDIR)/pipelines $(CURDIR)/schemas build/types/retrodb/
	@MYPYPATH=build/types $(BIN)/mypy --package retrodb

check: lint types test  ## Everything CI checks but the build.

bench: $(STAMP)  ## Measure the build against the bare encoder: INPUT=corpus.jsonl.gz.
	@$(BIN)/python benchmarks/build.py $(INPUT)

flink-jars: $(STAMP)  ## Fetch what a Flink cluster consists of (Java and Maven needed).
	@$(BIN)/python deploy/flink/cluster.py jars

flink-up: $(STAMP)  ## Start a Flink cluster on this machine: ARGS="--task-managers 1 --rest-port 8082".
	@$(BIN)/python deploy/flink/cluster.py up $(ARGS)

flink-down: $(STAMP)  ## End it.
	@$(BIN)/python deploy/flink/cluster.py down

prism:  ## Build Beam's runner in Go, which a test builds on (Go needed, a few minutes).
	@GOBIN=$(CURDIR)/deploy/prism go install github.com/apache/beam/sdks/v2/go/cmd/prism@v2.77.0

flink-test: $(STAMP)  ## Build on a Flink cluster of its own, with faults, and compare with the local build.
	@$(BIN)/python -m pytest -p no:xdist -s tests/test_flink.py $(ARGS)

kill-test: $(STAMP)  ## Kill a build 100 times at random moments, and compare what comes of it: ARGS="--kills 10".
	@$(BIN)/python benchmarks/kill_test.py $(ARGS)

soak-test: $(STAMP)  ## Train, refresh, add, delete and read at once while all of them are killed: ARGS="--minutes 2".
	@$(BIN)/python benchmarks/soak_test.py $(ARGS)

clean:  ## Remove the quickstart database and caches; the environment stays.
	@rm -rf quickstart-db quickstart-corpus.jsonl .pytest_cache .mypy_cache .ruff_cache .hypothesis
