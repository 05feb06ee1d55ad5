# Every target that needs the environment makes it first, from the lock file; a second run takes no time.
PYTHON ?= python3
SHELL := /bin/bash
.DEFAULT_GOAL := help

export STEELYARD_PORT := $(or $(PORT),$(STEELYARD_PORT))
export STEELYARD_HOST := $(or $(HOST_ADDRESS),$(STEELYARD_HOST))
export STEELYARD_MODELS := $(or $(MODELS),$(STEELYARD_MODELS))
export STEELYARD_PROFILE := $(or $(PROFILE),$(STEELYARD_PROFILE))

PY := .venv/bin/python
INSTALL := $(PYTHON) tools/install.py $(PROFILE)
PYTEST := $(PY) -m pytest
TWO := -n 2 --dist loadscope --no-loadscope-reorder
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: help install serve up down status test test-fast lint format soak bench-overhead bench-scale chaos gpu-check observe dashboards chart chart-docs images lock clean deploy deploy-upgrade deploy-remove wheelhouse

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PORT, MODELS, PROFILE (cpu, gpu, sim), HOST_ADDRESS, PYTHON, INVENTORY"

install: ## make .venv from the lock files, with what tests and checks need
	@$(INSTALL)

serve: install ## serve the catalog on 127.0.0.1:8000 in the foreground; Ctrl-C stops everything
	@exec $(PY) -m serving.cli.main up

up: install ## the same in the background, or apply the catalog to what runs
	@$(PY) -m serving.cli.main up --detach

down: install ## stop what `make up` started
	@$(PY) -m serving.cli.main down

status: install ## what runs
	@$(PY) -m serving.cli.main status

test: install ## every test that this machine can run, real engines included
	$(PYTEST) $(TWO) --durations=30

test-fast: install ## without engines and Ray, under a minute
	$(PYTEST) $(TWO) --hypothesis-profile fast -m "not engine and not ray and not gpu and not slow and not soak" tests/unit tests/gateway

soak: install ## a night: what takes too long for every run, the asynchronous tests and the chaos suite COUNT times (default 20; RESUME=1 goes on with its rounds and what follows), MINUTES of traffic (60)
	$(if $(RESUME),,$(PYTEST) -m soak)
	$(if $(RESUME),,for i in $$(seq $(or $(COUNT),20)); do $(PYTEST) -q -x -m "not engine and not ray and not gpu and not soak" tests/unit tests/gateway tests/engine || exit 1; done)
	$(PY) -m bench.chaos --repeat $(or $(COUNT),20) --long-s 12 --out .steelyard/bench/chaos-rounds.json $(if $(RESUME),--resume)
	$(PY) -m bench.chaos --long-s 180
	$(PY) -m bench.chaos --only saturation --saturation-s 1200
	$(PY) -m bench.chaos --engine vllm --saturation-s 300
	$(PY) -m bench.endure --minutes $(or $(MINUTES),60)

lint: install ## ruff, mypy, import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: install ## put the source into ruff's format
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench-overhead: install ## the stack against the raw engine: table, .steelyard/bench/overhead.json, exit 1 when a bar is missed
	$(PY) -m bench.overhead $(ARGS)

bench-scale: install ## queue, admission and scaling over simulated engines: table, .steelyard/bench/scale.json, exit 1 when a bar is missed
	$(PY) -m bench.scale $(ARGS)

chaos: install ## one fault at a time under open streams: table, .steelyard/bench/chaos.json, exit 1 when a bar is missed
	$(PY) -m bench.chaos $(ARGS)

gpu-check: ## where there is a GPU: its figures under known loads, then the stack against the raw engine with an 8B-shaped model
	$(if $(wildcard .venv/bin/python),$(PY),$(PYTHON)) -m pytest -q tests/gpu/test_gpu_figures.py
	$(if $(wildcard .venv/bin/python),$(PY),$(PYTHON)) -m bench.gpu_check $(ARGS)

observe: install ## a Prometheus (and Grafana where installed) for what runs, on 127.0.0.1; ARGS="--port 9090 --grafana-port 3000"
	@exec $(PY) -m tools.observe $(ARGS)

dashboards: install ## Grafana's dashboards in deploy/observability from tools/dashboards.py
	$(PY) -m tools.dashboards

chart: install ## every ci/ variant of the Helm chart: lint, render, validate, one line each
	$(PYTEST) -q tests/k8s

chart-docs: install ## the chart's README, schema and facts from values.yaml and the code
	$(PY) -m tools.chart

images: ## both images: BASE_DIGEST=sha256:... of python:3.11-slim-bookworm, IMAGE=name (default steelyard); needs Docker
	@[ -n "$(BASE_DIGEST)" ] || { echo "error: BASE_DIGEST is empty; look it up: docker buildx imagetools inspect python:3.11-slim-bookworm" >&2; exit 2; }
	for t in cpu cuda; do docker build -f deploy/docker/Dockerfile --target $$t --build-arg BASE_DIGEST=$(BASE_DIGEST) --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD) -t $(or $(IMAGE),steelyard):$(VERSION)-$$t . || exit 1; done

# The machine that deploys needs no engine: a small environment, unless .venv can do it.
DEPLOY_PY = $(shell .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("pyinfra") is None)' 2>/dev/null && echo .venv/bin/python || echo .venv-deploy/bin/python)
DEPLOY = $(if $(filter .venv/%,$(DEPLOY_PY)),,$(PYTHON) tools/install.py deploy &&) $(DEPLOY_PY) -m deploy
FLAGS = $(if $(filter 1 yes true,$(DRY_RUN)),--dry-run)

deploy: ## bare metal: INVENTORY=FILE [DRY_RUN=1]; a second run changes nothing
	@$(DEPLOY) deploy $(FLAGS) $(INVENTORY)

deploy-upgrade: ## machine by machine to this checkout: INVENTORY=FILE [DRY_RUN=1] [DOWNTIME=1]
	@$(DEPLOY) upgrade $(FLAGS) $(if $(filter 1 yes true,$(DOWNTIME)),--downtime) $(INVENTORY)

deploy-remove: ## leave nothing behind: INVENTORY=FILE [LIMIT=host,...] [YES=1] [DRY_RUN=1]
	@$(DEPLOY) remove $(FLAGS) $(if $(LIMIT),--limit $(LIMIT)) $(if $(filter 1 yes true,$(YES)),--yes) $(INVENTORY)

wheelhouse: ## the runtime's wheels for racks without an index: DIR=FOLDER PROFILE=gpu
	@$(PYTHON) tools/install.py $(or $(PROFILE),gpu) --download $(or $(DIR),wheelhouse)

# Runtime first; then what tests and checks need beside it, and whether that goes with the GPU machines' versions too.
UV_COMPILE = uv pip compile -q --python-version 3.11 --generate-hashes --no-annotate --no-header
UV_CPU = --extra cpu --override requirements/overrides.txt
UV_GPU = --extra gpu --python-platform x86_64-manylinux_2_28
lock: ## resolve pyproject.toml again into requirements/*.lock (needs uv)
	$(UV_COMPILE) pyproject.toml $(UV_CPU) -o requirements/cpu.lock
	$(UV_COMPILE) pyproject.toml $(UV_GPU) -o requirements/gpu.lock
	$(UV_COMPILE) pyproject.toml $(UV_CPU) --extra dev -c requirements/cpu.lock $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements/cpu.lock) -o requirements/dev.lock
	$(UV_COMPILE) pyproject.toml $(UV_GPU) --extra dev -c requirements/gpu.lock -c requirements/dev.lock >/dev/null
	$(UV_COMPILE) requirements/deploy.in -o requirements/deploy.lock

clean: ## remove .venv and caches; keeps keys and logs
	rm -rf .venv .venv-deploy .pytest_cache .mypy_cache .ruff_cache
