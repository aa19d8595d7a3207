# make run    runs the main job       make run ARGS="--config.seed=1"
# make test   runs the test suite     make test ARGS="-k decode"
# make lint   checks format and style
#
# Each first creates .venv with PYTHON (3.11 to 3.13); remove that folder to change interpreters.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq

.PHONY: run test lint

run: .venv/installed
	$(BIN)/python launch.py --config=configs/gqa8.py $(ARGS)

test: .venv/installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-test
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

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
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    2>/dev/null || { echo "gqa runs on Python 3.11 to 3.13, not on $(PYTHON)" \
	        "($$($(PYTHON) --version 2>&1 | head -n 1)): try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@
