# Every target first brings .venv up to date (instantly, when nothing changed). Arguments: make demo ARGS="--seed 3"

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup format lint types imports check test test-real bench demo lock clean

help:            ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:           ## virtual environment, pinned packages, the small model's package
	@$(PYTHON) deploy/install.py

format: setup    ## put the code into shape
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

lint: setup      ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup     ## mypy over the four packages
	$(BIN)/mypy

imports: setup   ## what must load fast loads
	$(BIN)/python -c "import protocol, actor, learner, deploy"

check: lint types imports ## all that runs in seconds

test: setup      ## the tests (at most three engine starts)
	$(BIN)/python -m pytest --ignore=tests/real $(ARGS)

test-real: setup ## all tests that start real engines, the long ones and the kills too
	$(BIN)/python -m pytest tests/real $(ARGS)

bench: setup     ## measure; results go to benchmarks/results
	$(BIN)/python -m benchmarks.run $(ARGS)

demo: setup      ## align SmolLM2-135M on arithmetic (under 10 minutes on two cores)
	$(BIN)/tandem demo $(ARGS)

lock: setup      ## resolve the pinned lists anew from pyproject.toml
	$(BIN)/python deploy/requirements/lock.py $(ARGS)

clean:           ## remove the environment and the caches of the tools; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
