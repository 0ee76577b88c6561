# Every target is a few visible lines; copy them if you have no make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu lint clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e .
	touch $@

$(BIN)/.dev: $(BIN)/.installed
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.installed  ## install, distil the embedded digits teacher to one step, measure it, write demo/report.html
	$(BIN)/diffaccel demo --output demo

test: $(BIN)/.dev  ## the fast tests (7 to 9 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(BIN)/.dev  ## the tests that train for minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: $(BIN)/.dev  ## the tests that need CUDA
	$(BIN)/python -m pytest -m gpu

lint: $(BIN)/.dev  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
