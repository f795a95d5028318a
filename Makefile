# Two commands set everything up: `make demo` runs the main job, `make test` passes the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-e2e lint kill-test benchmarks overhead soak attack-power clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

install: $(STAMP)  ## create .venv with the locked environment

# uv is taken from the path, else installed into a small environment of its own.
$(STAMP): pyproject.toml uv.lock
	@command -v uv >/dev/null || test -x .venv-uv/bin/uv || \
		($(PYTHON) -m venv .venv-uv && .venv-uv/bin/pip install --quiet uv)
	@PATH="$$PATH:$$PWD/.venv-uv/bin" && UV_COMPILE_BYTECODE=1 \
		uv sync --frozen --all-extras --python "$$(command -v $(PYTHON))"
	@touch $@

demo: install  ## make four synthetic hospitals and train across them through `flwr run`
	@$(BIN)/fedward simulate --synthetic 4 --study demo --out runs/demo --overwrite

lint: install  ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

test: install lint  ## everything that must pass
	@$(BIN)/python -m pytest

test-e2e: install  ## everything between real processes: kills, faults, attackers (about 40 minutes)
	@FEDWARD_E2E=all $(BIN)/python -m pytest -s tests/e2e

overhead: install  ## what a round costs beside training, three hospitals over TLS (about 10 minutes)
	@$(BIN)/python -m tests.e2e.overhead

soak: install  ## an hour of random kills; memory of daemon and coordinator
	@$(BIN)/python -m tests.e2e.soak --minutes 60

kill-test: install  ## kill a daemon 200 times at random moments (about 5 minutes)
	@FEDWARD_KILLS=200 $(BIN)/python -m pytest -s tests/privacy/test_kill.py

benchmarks: install  ## step, round, encoders, import and ledger (about 30 minutes)
	@$(BIN)/python -m simulations.benchmarks.dp_step
	@$(BIN)/python -m simulations.benchmarks.overhead
	@$(BIN)/python -m simulations.benchmarks.encoders
	@$(BIN)/python -m simulations.benchmarks.importing
	@$(BIN)/python -m simulations.benchmarks.ledger

attack-power: install  ## how often the attack finds each planted bug (about 80 minutes)
	@$(BIN)/python -m simulations.attack.power

clean:  ## remove what running leaves in the checkout
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
