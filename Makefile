# `make` lists the commands. Each builds .venv first where it is missing or older than pyproject.toml or constraints.txt.
# Nothing but Python (3.11 or newer, with its venv module), make and a C compiler has to be there.

VENV := .venv
VENV_PY312 := .venv-py312
VENV_BENCH := .venv-bench
# The first Python that starts and is new enough; another one: make setup PYTHON=/path/to/python
PYTHON ?= $(call find_python,python3.11 python3.12 python3.13 python3.14 python3,11)
PYTHON_PY312 ?= $(call find_python,python3.12 python3.13 python3.14 python3 $(PYENV_PYTHONS),12)
PYENV_PYTHONS = $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1[2-9]*/bin/python3)
# What `make test` hands to pytest, e.g. PYTEST_ARGS="-k layouts"
PYTEST_ARGS ?=
# What `make test-py312` repeats: parity with the reference, the layouts, the layer specs. pytest refuses a path that is not there.
PY312_TESTS ?= tests/model tests/checkpoint/test_layer_specs.py tests/inference \
    tests/distributed/test_topology.py tests/distributed/test_fused_kernels.py tests/integration/test_injection.py \
    tests/integration/test_reference.py tests/integration/test_layouts.py tests/integration/test_packed_training.py
# What `make bench-data` hands to tools/bench/data.py, e.g. BENCH_ARGS="--only read pack --scale 0.1"
BENCH_ARGS ?=
# What `make gpu-check` hands to tools/gpu_check, e.g. GPU_CHECK_ARGS="--gpus 2 --only layouts"
GPU_CHECK_ARGS ?=
# torch is pinned in one place, and installed before anything that would take whichever torch is newest.
TORCH = $(shell grep '^torch==' constraints.txt)

# Older ones write outside their folder for a hostile archive. Where no index has it, the old one installs the rest.
PIP := pip>=26.2

find_python = $(shell for python in $(1); do \
    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, $(2)))' 2>/dev/null && echo "$$python" && break; done)

.DEFAULT_GOAL := help
.PHONY: help newcomer setup quickstart test test-fast lint test-py312 python-py312 campaign-convert-7b campaign-data campaign-faults campaign-hostile campaign-injection campaign-saves bench-checkpoint bench-data bench-model bench-pipeline tensorboard clean campaign-slurm gpu-check docs docs-serve

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/complete ## The environment alone (.venv)

quickstart: $(VENV)/complete ## The whole job on a small made-up world: shards, align, instruct, evaluate (5 minutes on 2 cores)
	$(VENV)/bin/python -m pipelines.quickstart

test: $(VENV)/complete lint ## Format, lint, types and all tests
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-fast: $(VENV)/complete lint ## Format, lint, types and the tests of one process (2 minutes on 2 cores)
	$(VENV)/bin/python -m pytest --fast $(PYTEST_ARGS)

lint: $(VENV)/complete ## Format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test-py312: $(VENV_PY312)/complete ## Parity, layouts and specs on Python 3.12 or newer, with its newer megatron-core
	$(VENV_PY312)/bin/python -m pytest $(PY312_TESTS) $(PYTEST_ARGS)

# The Python that `make test-py312` takes; nothing where there is none.
python-py312:
	@echo $(PYTHON_PY312)

newcomer: $(VENV)/complete ## A fresh clone, and README's commands in their order (20 minutes on 2 cores)
	$(VENV)/bin/python -m pytest -m campaign -rP tests/campaigns/test_newcomer.py $(PYTEST_ARGS)

campaign-slurm: $(VENV)/complete ## Every scenario on a private Slurm of two nodes (20 minutes on 2 cores)
	$(VENV)/bin/python -m pytest -m 'campaign or not campaign' tests/slurm $(PYTEST_ARGS)

campaign-data: $(VENV)/complete ## Kill preprocessing, and interrupt reading, very often (KILLS=50 SEED=1 EMOJI=DIR; half an hour)
	KILLS="$(KILLS)" SEED="$(SEED)" EMOJI="$(EMOJI)" $(VENV)/bin/python -m pytest -m campaign -s \
	    tests/campaigns/test_kill_preprocess.py tests/campaigns/test_draws.py $(PYTEST_ARGS)

campaign-faults: $(VENV)/complete ## Let random real faults happen to runs, each of which must recover by itself (FAULTS=500 SEED=1 REPORT=DIR)
	FAULTS="$(FAULTS)" SEED="$(SEED)" REPORT="$(REPORT)" $(VENV)/bin/python -m pytest -m campaign -s --show-capture=no tests/campaigns/test_faults.py $(PYTEST_ARGS)

campaign-hostile: $(VENV)/complete ## Hostile files and requests, drawn by a seed, for every entry (SEED=1 MINUTES=10; CASE=123 repeats one)
	SEED="$(SEED)" MINUTES="$(MINUTES)" CASE="$(CASE)" ONLY="$(ONLY)" REPORT="$(REPORT)" $(VENV)/bin/python -m pytest -m campaign -s \
	    --show-capture=no tests/campaigns/test_hostile.py $(PYTEST_ARGS)

campaign-injection: $(VENV)/complete ## Random choices of how vision enters the decoder, each against its equations (SEED=1 NUMBER=40; CASE=17 repeats one)
	SEED="$(SEED)" NUMBER="$(NUMBER)" CASE="$(CASE)" REPORT="$(REPORT)" $(VENV)/bin/python -m pytest -m campaign -s \
	    --show-capture=no tests/campaigns/test_injection.py $(PYTEST_ARGS)

campaign-saves: $(VENV)/complete ## Kill ranks at every point of a save, and damage every file of one (288 kills, 1,300 damages; 5 minutes)
	LAYOUTS="$(LAYOUTS)" FLIPS="$(FLIPS)" CUTS="$(CUTS)" SEED="$(SEED)" $(VENV)/bin/python -m pytest -m campaign -s \
	    tests/campaigns/test_save_kills.py tests/campaigns/test_save_damage.py $(PYTEST_ARGS)

campaign-convert-7b: $(VENV)/complete ## Convert a 7B model's shapes, and measure the memory (5 minutes, 30 GB of disk)
	$(VENV)/bin/python -m pytest -m campaign -rP tests/conversion/test_memory.py $(PYTEST_ARGS)

bench-data: $(VENV_BENCH)/complete ## Reading, decoding, preprocessing and packing beside webdataset, megatron-energon and Ray Data
	$(VENV_BENCH)/bin/python -m tools.bench.data $(BENCH_ARGS)

bench-model: $(VENV)/complete ## The decoder beside concatenation and padding (10 minutes on 2 cores)
	$(VENV)/bin/python -m tools.bench.decoder $(BENCH_ARGS)

bench-checkpoint: $(VENV)/complete ## How long a save keeps training waiting (2 minutes on 2 cores, 4 GB of disk)
	$(VENV)/bin/python -m tools.bench.checkpoint $(BENCH_ARGS)

bench-pipeline: $(VENV)/complete ## How evenly pipeline stages work, by where the tower runs (5 minutes on 2 cores)
	$(VENV)/bin/python -m tools.bench.pipeline

gpu-check: $(VENV)/complete ## Is it right on the GPU of this machine? Without one: the same checks, tiny (3 minutes on 2 cores)
	$(VENV)/bin/python -m tools.gpu_check --stage correctness --out runs/gpu-check $(GPU_CHECK_ARGS)

tensorboard: $(VENV)/complete ## TensorBoard over all runs, on this machine only
	$(VENV)/bin/tensorboard --logdir runs --host 127.0.0.1

docs: $(VENV)/complete ## The documentation as a site, in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

docs-serve: $(VENV)/complete ## The same site on 127.0.0.1:8000, built again when a page changes
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs serve --strict --dev-addr 127.0.0.1:8000

clean: ## Remove environments and caches; runs and data stay
	rm -rf .venv .venv-py312 .venv-bench .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is done again.
$(VENV)/complete: pyproject.toml constraints.txt
	@$(call build_venv,$(VENV),$(PYTHON),3.11,PYTHON,dev)

$(VENV_PY312)/complete: pyproject.toml constraints.txt
	@$(call build_venv,$(VENV_PY312),$(PYTHON_PY312),3.12,PYTHON_PY312,dev)

# Beside the package what it is compared with, none of which it needs.
$(VENV_BENCH)/complete: pyproject.toml constraints.txt
	@$(call build_venv,$(VENV_BENCH),$(PYTHON),3.11,PYTHON,bench)

# $(1) folder, $(2) Python, $(3) least version, $(4) the variable that chooses another, $(5) the extra
define build_venv
set -e; \
test -n "$(2)" || { echo "error: no Python $(3) or newer with venv and ensurepip found (Debian: install python3-venv):" \
    "name one with $(4)=/path/to/python3" >&2; exit 2; }; \
"$(1)/bin/python" -m pip --version >/dev/null 2>&1 || { rm -rf "$(1)"; "$(2)" -m venv "$(1)"; }; \
echo "Installing into $(1) (one to three minutes)"; \
export PIP_DISABLE_PIP_VERSION_CHECK=1; \
"$(1)/bin/python" -m pip install --quiet "$(PIP)" || echo "note: going on with the pip of $(1), older than $(PIP)" >&2; \
"$(1)/bin/python" -m pip install --quiet "$(TORCH)"; \
"$(1)/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[$(5)]'; \
touch "$(1)/complete"
endef
