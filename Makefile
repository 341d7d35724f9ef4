# Two commands do everything, set-up included: `make test` and `make demo`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OTHER_TRITON := $(CURDIR)/.cache/triton-3.9.0
PIP := $(BIN)/python -m pip --disable-pip-version-check
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup test test-all demo lint format clean

help:
	@echo "make demo      train through three stages on real text, kill, resume, plot"
	@echo "make test      unit and distributed tests (about 15 minutes on 2 cores)"
	@echo "make test-all  the slow ones too"
	@echo "make lint      ruff and mypy"

setup: $(VENV)/.ready

# torch before anything that depends on it, at the version of the constraints file
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0 numpy
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

# one process per core for the unit tests; cases that start ranks use the cores themselves
test: setup lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not dist and not gpu"
	$(BIN)/python -m pytest -q -m "dist and not slow and not gpu"

# the kernel gate runs with the pinned Triton and with the newest one that CPU builds of torch may carry
test-all: setup lint $(OTHER_TRITON)/triton
	MEGASTAGE_OTHER_TRITON=$(OTHER_TRITON) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not dist"
	$(BIN)/python -m pytest -q -m "dist"

$(OTHER_TRITON)/triton: | setup
	$(PIP) install --quiet --no-deps --target $(OTHER_TRITON) triton==3.9.0

demo: setup
	$(BIN)/python -m tools.demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out outputs
