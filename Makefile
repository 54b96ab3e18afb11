# `make` alone says what one can do here. Nothing needs root or Docker.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.made-from-lock
VERSION ?= 3
JOBS ?= 4

# The system's certificates, as pip, git and curl use them: behind a company's proxy uv's own do not do.
export UV_SYSTEM_CERTS ?= true

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-check up down worker flower airflow listen trigger doctor health status parked wake cancel dead airflows hold release gateway socket watch
.PHONY: test lint format types bench messages lock clean

# Make would read a `$$` in them as its own; they go on as written, in the environment, never in a command.
unexport DAG CONF KEY ID CONNECTION REASON
trigger: export TRIGGER_DAG := $(value DAG)
trigger: export TRIGGER_CONF := $(value CONF)
trigger: export TRIGGER_KEY := $(value KEY)
status: export STATUS_ID := $(value ID)
watch: export WATCH_ID := $(value ID)
wake: export WAKE_ID := $(value ID)
cancel: export CANCEL_ID := $(value ID)
hold release: export HOLD_CONNECTION := $(value CONNECTION)
hold: export HOLD_REASON := $(value REASON)

# Whose Redis: DAGRELAY_REDIS_URL, else REDIS_URL, else the one of `make up`.
REDIS = [ -n "$$DAGRELAY_REDIS_URL$$DAGRELAY_REDIS_URL_FILE" ] || [ -z "$$REDIS_URL" ] || \
	export DAGRELAY_REDIS_URL="$$REDIS_URL"; \
	[ -n "$$DAGRELAY_REDIS_URL_FILE" ] || [ ! -f .local/up/env ] || . ./.local/up/env;
# For what is nothing without one.
NEED_REDIS = $(REDIS) [ -n "$$DAGRELAY_REDIS_URL$$DAGRELAY_REDIS_URL_FILE" ] || \
	{ echo 'DAGRELAY_REDIS_URL is not set, and no stack is up here: make up starts one' >&2; exit 78; };

help:
	@echo 'make TARGET'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## the whole trip: Valkey, Airflow 3, a worker, Flower, one run; stays until Ctrl-C
	@exec $(PY) -m local.demo

demo-check: $(READY)  ## the same without staying; fails unless the run succeeded
	@exec $(PY) -m local.demo --check

up: $(READY)  ## the stack for your own Airflow, in the background (AIRFLOW_CONN_DEFAULT [REDIS_URL] [WORKERS=1])
	@$(PY) -m local.up up

down: $(READY)  ## stop what `make up` started
	@$(PY) -m local.up down

worker: $(READY)  ## one worker, here in the foreground (AIRFLOW_CONN_DEFAULT)
	@$(REDIS) exec $(PY) -m celery -A tasks worker $(ARGS)

flower: $(READY)  ## Flower, here in the foreground
	@$(NEED_REDIS) exec $(PY) -m local.up flower

airflow: $(READY)  ## a real Airflow for development, with our operators, in the foreground ([VERSION=3|2] [PORT=8080])
	@$(REDIS) exec $(PY) -m local.airflow --version $(VERSION) $(if $(PORT),--port $(PORT)) --provider --triggerer $(ARGS)

listen: $(READY)  ## take requests from a queue, in the foreground (DAGRELAY_LISTEN_URL [ARGS='--rules rules.toml'])
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay listen $(ARGS)

trigger: $(READY)  ## start a run: DAG=daily_sales [CONF='{"region": "north"}'] [KEY=…]
	@[ -n "$$TRIGGER_DAG" ] || { echo "which DAG? make trigger DAG=daily_sales CONF='{…}'" >&2; exit 64; }
	@$(NEED_REDIS) set --; \
	[ -z "$$TRIGGER_CONF" ] || set -- "$$@" "--conf=$$TRIGGER_CONF"; \
	[ -z "$$TRIGGER_KEY" ] || set -- "$$@" "--key=$$TRIGGER_KEY"; \
	exec $(VENV)/bin/dagrelay trigger "$$@" -- "$$TRIGGER_DAG"

status: $(READY)  ## what became of a request, and its history: ID=…
	@[ -n "$$STATUS_ID" ] || { echo 'of which request? make status ID=…' >&2; exit 64; }
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay status -- "$$STATUS_ID"

watch: $(READY)  ## follow a request until it ends: ID=…
	@[ -n "$$WATCH_ID" ] || { echo 'which request? make watch ID=…' >&2; exit 64; }
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay watch -- "$$WATCH_ID"

parked: $(READY)  ## what waits in Redis, for what and until when ([ARGS='-n 500'])
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay parked $(ARGS)

wake: $(READY)  ## have what waits go on at once: ID=…
	@[ -n "$$WAKE_ID" ] || { echo 'which request? make wake ID=…' >&2; exit 64; }
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay wake -- "$$WAKE_ID"

cancel: $(READY)  ## cancel a request that has not ended: ID=…
	@[ -n "$$CANCEL_ID" ] || { echo 'which request? make cancel ID=…' >&2; exit 64; }
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay cancel -- "$$CANCEL_ID"

dead: $(READY)  ## what failed for good, and why ([ARGS='--error DagNotFound'])
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay dead list $(ARGS)

airflows: $(READY)  ## how each Airflow fares: in flight, limit, in line, does it answer
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay airflows

hold: $(READY)  ## send nothing to an Airflow until it is released: CONNECTION=… [REASON=…]
	@[ -n "$$HOLD_CONNECTION" ] || { echo 'which Airflow? make hold CONNECTION=default' >&2; exit 64; }
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay hold --reason "$${HOLD_REASON:-maintenance}" -- "$$HOLD_CONNECTION"

release: $(READY)  ## have requests for an Airflow go on: CONNECTION=…
	@[ -n "$$HOLD_CONNECTION" ] || { echo 'which Airflow? make release CONNECTION=default' >&2; exit 64; }
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay release -- "$$HOLD_CONNECTION"

gateway: $(READY)  ## the HTTP door, here in the foreground (DAGRELAY_GATEWAY_KEYS_FILE [ARGS='--port 8080'])
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay gateway $(ARGS)

socket: $(READY)  ## the TCP door, here in the foreground (ARGS='--keys keys.toml' or ARGS=--insecure)
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay socket $(ARGS)

doctor: $(READY)  ## the effective settings, with every dependency tried
	@$(REDIS) exec $(VENV)/bin/dagrelay doctor

health: $(READY)  ## is anything stuck, and what to do about it
	@$(NEED_REDIS) exec $(VENV)/bin/dagrelay health --progress

test: $(READY)  ## the tests, in 4 processes, JOBS=0 in this one ([JOBS=4] [ARGS='tests/unit -x'])
	@exec $(PY) -m pytest -n $(JOBS) $(if $(ARGS),$(ARGS),$(wildcard tests/system tests/integration tests/unit))

lint: $(READY)  ## style, format and spelling
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(VENV)/bin/codespell

format: $(READY)  ## put the code into its format
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

types: $(READY)  ## check the types
	$(PY) -m mypy

bench: $(READY)  ## one benchmark: NAME=latency; its last line is one JSON object
	@[ -f 'benchmarks/$(NAME).py' ] || { echo "NAME= one of:" $(basename $(notdir $(wildcard benchmarks/[a-z]*.py))) >&2; exit 64; }
	@exec $(PY) -m benchmarks.$(NAME) $(ARGS)

messages: $(READY)  ## write docs/messages.schema.json and docs/asyncapi.json anew, from the contract
	@exec $(PY) -m producers.message_docs docs

lock: $(READY)  ## write the locks anew from pyproject.toml, keeping versions ([ARGS=--upgrade])
	$(COMPILE) $(addprefix --extra ,$(EXTRAS)) --group dev pyproject.toml -o requirements.lock $(ARGS)
	$(COMPILE) --extra worker --extra flower --extra gateway --extra queues -c requirements.lock pyproject.toml -o requirements-worker.lock
	awk '/^[^ ]/ {uv = /^uv==/} uv' requirements.lock > local/bootstrap.lock
	$(PY) -m local.provider

# All but `airflow`: an Airflow is an environment of its own, with a lock of its own.
EXTRAS = worker flower otel gateway queues crypto local

COMPILE = $(PY) -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

clean:  ## remove what was made here, except .local/data: what `make up` accepted
	@[ ! -x $(PY) ] || [ ! -f .local/up/lock ] || $(PY) -m local.up down
	[ ! -d .local ] || find .local -mindepth 1 -maxdepth 1 ! -name data -exec rm -rf {} +
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment: exactly the lock, by uv, or by pip where uv cannot run; then the command `dagrelay`, built
# by the locked hatchling. From the network come the locked packages and nothing else.
$(READY): requirements.lock local/bootstrap.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON): make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "$(PYTHON) cannot make virtual environments: install python3-venv, or another Python" >&2; exit 1; }
	@echo "making $(VENV) from requirements.lock (about 10 s at the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r local/bootstrap.lock && \
	$(PY) -m uv pip sync -q --require-hashes --python $(PY) requirements.lock && \
	$(PY) -m uv pip install -q --no-deps --no-build-isolation --python $(PY) -e . || \
	{ echo "uv does not work here: with pip, which takes longer" >&2; \
	$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock && \
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .; }
	@touch $@
