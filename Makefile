# embedding-sidecar: `make run` serves, `make test` tests; both do all the set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_EXAMPLE := .venv-example

.PHONY: run test check format test-clients example test-example test-real figures bench bench-adapter load docs clean help

help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/installed  ## Serve the embedded model on a Unix socket and on 127.0.0.1:8484
	@exec $(BIN)/embedding-sidecar run --hello

test: $(VENV)/installed-test check  ## Lint, types, unit tests and whole journeys, with branch coverage
	$(BIN)/python -m pytest --cov --cov-report=term

check: $(VENV)/installed-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-test  ## Let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-clients: $(VENV)/installed-test  ## The official clients against the running proxy (installs them, and needs Node)
	sh tests/clients/install.sh
	.venv-clients/bin/python -m pytest tests/clients

example: $(VENV_EXAMPLE)/installed  ## A RAG service with PostgreSQL and the proxy, and what to paste (ARGS="--port 8001 my.md")
	@exec env PYTHONPATH=docs/examples $(VENV_EXAMPLE)/bin/python -m rag_service $(ARGS)

test-example: $(VENV_EXAMPLE)/installed-test  ## That service end to end: search, outages, deadlines, traces
	$(VENV_EXAMPLE)/bin/python -m pytest tests/example

test-real: $(VENV)/installed-test  ## A real embeddings server with real weights behind the proxy (installs it, 1.5 GB)
	sh tests/real/install.sh
	$(BIN)/python -m pytest tests/real

figures: $(VENV)/installed-test  ## Print the figures of docs/operations.md
	$(BIN)/python -m tests.load.figures

bench: $(VENV)/installed-test  ## Measure speed and memory against the targets (ARGS="--only single-64", --list)
	@$(BIN)/python -m tests.load.bench $(ARGS)

bench-adapter: $(VENV)/installed-test  ## Measure the adapter against its targets (ARGS="--tools DIR")
	@$(BIN)/python -m tests.load.adapter $(ARGS)

load: $(VENV)/installed-test  ## Before and after under load, with a report in build/load (ARGS="--quick", "--only dies", --list)
	@$(BIN)/python -m tests.load.suite $(ARGS)

docs: $(VENV)/installed  ## Write the reference of settings into docs/configuration.md
	$(BIN)/python docs/write_reference.py

clean:  ## Remove what the other targets have made
	rm -rf .venv .venv-clients .venv-example .venv-real build dist *.egg-info .coverage* .mypy_cache .pytest_cache .ruff_cache
	rm -rf .hypothesis tests/clients/node_modules

# A virtual environment that an aborted installation left behind has no `installed`, and is made anew.
$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name it: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv is missing; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV), about a minute the first time …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[proxy]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing the test tools …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[proxy,test]'
	@touch $@

# The example has an environment of its own, as an app has: the proxy runs as its child and has to be in it, too.
$(VENV_EXAMPLE)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later with venv is needed; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV_EXAMPLE), about a minute the first time …"
	@test -x $(VENV_EXAMPLE)/bin/python || $(PYTHON) -m venv $(VENV_EXAMPLE)
	@$(VENV_EXAMPLE)/bin/python -m pip install -qq --disable-pip-version-check -e '.[proxy,example]'
	@touch $@

$(VENV_EXAMPLE)/installed-test: $(VENV_EXAMPLE)/installed
	@$(VENV_EXAMPLE)/bin/python -m pip install -qq --disable-pip-version-check 'pytest>=8.3,<10' 'pytest-asyncio>=1,<2'
	@touch $@
