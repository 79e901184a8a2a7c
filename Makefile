# Everything that `make` needs it installs into .venv: Python 3.11+ and a package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINUTES ?= 30
ROOM ?=
# Tests wait for servers and processes half of their time: some more workers than cores.
WORKERS ?= $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))
SEED ?=
HOSTILE ?=

.PHONY: help demo test chaos test-engine check docs bench lock clean
.DEFAULT_GOAL := help

help: ## show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## start a fleet, show every feature, kill it, bring it back
	$(BIN)/kvplane demo

test: $(READY) ## run the tests, or those of one room: make test ROOM=routing
	$(BIN)/pytest -q --durations=20 -n $(WORKERS) --dist worksteal tests/$(ROOM)

chaos: $(READY) ## kill, stop and cut a fleet under load: make chaos MINUTES=30 SEED=1 HOSTILE=1, report in build/chaos.json
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(HOSTILE),--hostile) --out build/chaos.json

test-engine: $(READY) ## run two real vLLM engines behind a router (installs 3.5 GB into build/)
	$(BIN)/python -m tests.engines.live
	$(BIN)/python -m tests.engines.live_runtime
	$(BIN)/python -m tests.engines.live_streams
	$(BIN)/python -m tests.engines.live_tokens
	$(BIN)/python -m tests.engines.live_hybrid gemma3

check: $(READY) ## style, types, imports, purity
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -q tests/house/test_tidy.py

docs: $(VENV)/.docs ## make the site of docs/ in build/site, with every link checked
	$(BIN)/python -m docs.site build/site-sources
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet \
	  -c docs/site -d build/site-cache build/site-sources build/site
	@echo "open build/site/index.html"

$(VENV)/.docs: $(READY) docs/requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r docs/requirements.lock
	@touch $@

bench: $(READY) ## measure, as a table and build/bench.json
	$(BIN)/python -m benchmarks.run

lock: ## pin all dependencies again
	uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --extra dev pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --constraints requirements.lock pyproject.toml -o compose/requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
	  --constraints requirements.lock --extra docs pyproject.toml -o docs/requirements.lock

clean: ## remove what make made
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis
