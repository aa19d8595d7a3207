# make run        runs the main job        make run ARGS="--config.seed=1"
# make test       runs the quick tests     make test ARGS="-k decode"
# make test-all   runs every test
# make lint       checks format, style and types
#
# Each first creates .venv with PYTHON (3.11 or newer); remove that folder to change interpreters.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq

.PHONY: run test test-all lint

run: .venv/installed
	$(BIN)/python launch.py --config=configs/gqa8.py $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: .venv/installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-test
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Each stamp is as old as its installation: requirements edited since then install again.
.venv/installed: requirements.txt | .venv/created
	@echo "Installing requirements.txt into .venv (about 280 MB to download, a minute or two)"
	@$(INSTALL) -r requirements.txt
	@touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	@echo "Installing requirements-test.txt into .venv"
	@$(INSTALL) -r requirements-test.txt
	@touch $@

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    2>/dev/null || { echo "gqa runs on Python 3.11 and newer, not on $(PYTHON)" \
	        "($$($(PYTHON) --version 2>&1 | head -n 1)): try make PYTHON=python3.13" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@
