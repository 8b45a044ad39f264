# The one way to set up, check, test and run Lockstep. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-all check format docs benchmark sweep faults clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## make .venv and install Lockstep with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt scripts/setup/bootstrap.py $(wildcard .core/current)
	@$(PYTHON) scripts/setup/bootstrap.py --venv $(VENV)
	@touch $(STAMP)

demo: setup ## train the reference pair through both doors and compare the two runs
	$(BIN)/lockstep correlate

test: setup ## run the tests, without the slow sweeps
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: setup ## run only the slow sweeps
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

test-all: setup ## run every test
	$(BIN)/python -m pytest -n $(WORKERS)

check: setup ## the gate: format, lint, types, docs, every test file collected
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m lockstep.docs --check
	$(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/check_tests.py
	@git ls-files '*.py' | xargs wc -l | awk '$$2 != "total" && $$1 > 600 {print "warning: " $$2 " has " $$1 " lines"}'

format: setup ## rewrite the source in the project's format and apply safe lint fixes
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: setup ## write the generated reference pages
	$(BIN)/python -m lockstep.docs

benchmark: setup ## time training steps against Hugging Face GPT-2 of the same shape
	$(BIN)/python benchmarks/vs_hf_gpt2.py

sweep: setup ## train a tiny model in every layout and compare with one process
	$(BIN)/python -m tests.parallel.table --write docs/layouts.md

faults: setup ## run every planted fault and every clean pair through lockstep localise
	$(BIN)/python -m tests.lab.fault_table --write docs/faults.md
	$(BIN)/python -m tests.lab.command_pairs --write docs/clean-pairs.md

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
