PY := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup search test test-slow test-long test-chaos lint clean always

# an environment whose interpreter is gone counts as not made, whatever its stamp says
ifneq ($(shell $(PY) -c 'print(1)' 2>/dev/null),1)
.venv/.stamp: always
endif

help:  ## this list (pass options by ARGS="...")
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: .venv/.stamp  ## make or update .venv (PYTHON=/path/to/python to choose one)

.venv/.stamp: pyproject.toml constraints.txt .ci/setup .ci/install-torch
	@PYTHON="$(PYTHON)" .ci/setup

search: setup  ## search for the best sharing plan; without ARGS the quickstart
	$(PY) jobs/search.py $(ARGS)

test: setup  ## the quick tests and the examples in docstrings
	$(PY) -m pytest $(ARGS)

test-slow: setup  ## the slow tests: several processes, whole studies
	$(PY) -m pytest -m slow $(ARGS)

test-long: setup  ## the longest ones: several nodes, fifty trials on one worker, all of ZeRO-3
	$(PY) -m pytest -m long $(ARGS)

test-chaos: setup  ## studies on three nodes with something killed at every moment (over an hour)
	$(PY) -m pytest -m chaos $(ARGS)

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:  ## remove .venv and all caches; results stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
