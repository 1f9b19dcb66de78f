# make serve [ARGS="--model DIR_OR_ID --port 8123"]   everything it needs, then the stack
# make test [ARGS="tests/e2e -k paris"]                what tests need, then all of them, in two lanes (tests/conftest.py)
# make compose-check [ARGS=--quick]                  the compose deployment in a container engine, if one answers
# make lint · make format · make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
INPUTS := pyproject.toml constraints.txt services/pagewire/version.py
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
SIZES := with PyTorch for CUDA pip downloads about 3 GB, where its CPU build is in $(VENV) already 0.4 GB

.DEFAULT_GOAL := serve
.PHONY: serve test lint format clean compose-check

serve: $(VENV)/.installed
	@exec $(BIN)/pagewire serve $(ARGS)

test: $(VENV)/.installed-dev
	@exec $(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n 2)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

compose-check: $(VENV)/.installed-dev
	@exec scripts/compose-check $(ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Pagewire needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# What `make test` installs holds all that `make serve` needs.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "Installing Pagewire into $(VENV), a few minutes the first time: $(SIZES)"
	@$(PIP) -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "Installing Pagewire and what its tests need into $(VENV), a few minutes the first time: $(SIZES)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
