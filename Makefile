# make setup   builds .venv in this checkout (needs Python 3.11 and pip; about a minute)
# make demo    the whole chain on the miniature models; ends with a drawn picture
# make test    lint, types, import rules, tests; within 15 minutes on two cores
# make soak    the long tests
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check soak clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt tools/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" tools/setup.sh
	@touch $@

demo: setup
	$(BIN)/fastsd demo demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Our own bytecode is kept also where the environment says no: hundreds of processes are started.
test: check
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -m "not soak" -q -n 2 --dist loadfile --no-loadscope-reorder

soak: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -m soak -q

clean:
	rm -rf $(VENV) demo build *.egg-info
