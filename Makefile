# Everything starts from a machine that has only Python 3.11 or newer: each target makes .venv by itself the first time.
#
#   make demo     install what is needed and run the demo
#   make test     install what is needed and run lint, types and tests
#   make help     the other targets
#
# Variables (make test TORCH_INDEX=... WORKERS=4 PYTEST_ARGS="-k cli"):
#   PYTHON        the interpreter .venv is made from (default: the first one found that is 3.11 or newer)
#   TORCH_INDEX   the package index that torch alone is taken from (default: the one pip is configured with)
#   WORKERS       how many processes run the tests
#   PYTEST_ARGS   more arguments for pytest
#
# torch comes first and by its exact version. Without an NVIDIA GPU the CPU build (`+cpu`) is asked for; a package index that
# has only the CUDA build then still works, but downloads several GB that are never used. For the small build there, name
# PyTorch's own CPU index (the URL that the "Get Started" page of pytorch.org shows for "CPU") in TORCH_INDEX. On a machine
# with a GPU of another CUDA version than the default build's, TORCH_INDEX names that version's index.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
TORCH_INDEX ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet --quiet  # errors only: each step says itself what it does
PINNED := $(PIP) install --constraint constraints.txt
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: help
help:  ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# --- set-up: each stamp is remade only when what it was installed from changes ---------------------------------------

$(VENV)/.stamp-torch: constraints.txt
	@python=$${PYTHON:-}; \
	for candidate in $$python python3 python python3.13 python3.12 python3.11 python3.14; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "shapedpo needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "[1/4] virtual environment $(VENV) ($$($$python --version))"; \
	[ -x $(PY) ] || $$python -m venv $(VENV) || { echo "This Python cannot make virtual environments: install its venv package (python3-venv on Debian and Ubuntu) and try again." >&2; rm -rf $(VENV); exit 1; }
	@echo "[2/4] torch $(TORCH_VERSION)"
	@if command -v nvidia-smi >/dev/null || [ "$$(uname -s)" != Linux ]; then \
	  $(PINNED) $(TORCH_FROM) torch==$(TORCH_VERSION); \
	else \
	  $(PINNED) $(TORCH_FROM) torch==$(TORCH_VERSION)+cpu 2>/dev/null || { \
	    echo "      no GPU here, and no CPU build of torch on this package index: the CUDA build will do, but it downloads"; \
	    echo "      several GB. To avoid that, stop here and see TORCH_INDEX at the top of the Makefile."; \
	    $(PINNED) $(TORCH_FROM) torch==$(TORCH_VERSION); }; \
	fi
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch pyproject.toml
	@echo "[3/4] shapedpo and what it needs (about two minutes the first time)"
	@$(PINNED) --editable .
	@touch $@

# deepspeed builds from source against the torch that is there, hence --no-build-isolation and its build tools beforehand.
$(VENV)/.stamp-dev: $(VENV)/.stamp-package
	@echo "[4/4] what the tests need, deepspeed among it"
	@$(PINNED) --editable '.[dev]' setuptools ninja py-cpuinfo hjson msgpack
	@DS_BUILD_OPS=0 $(PINNED) --no-build-isolation --editable '.[deepspeed]'
	@touch $@

.PHONY: install install-dev
install: $(VENV)/.stamp-package  ## make .venv with the package in it
install-dev: $(VENV)/.stamp-dev  ## the same with what the tests need

# --- the two commands ------------------------------------------------------------------------------------------------

.PHONY: demo test
demo: install  ## train the goblin world with plain DPO and with shaped DPO, and print the table
	@$(PY) -m shapedpo demo $(DEMO_ARGS)

# Types beside the tests: mypy takes a minute of one core.
test: lint  ## lint, types and tests: what continuous integration runs
	@$(MAKE) --no-print-directory --jobs=2 types pytest

# --- its parts, and the rest -----------------------------------------------------------------------------------------

.PHONY: lint types browser pytest test-ranks format bench constraints clean
lint: install-dev  ## ruff: rules and format
	@echo "== ruff check";  $(PY) -m ruff check .
	@echo "== ruff format"; $(PY) -m ruff format --check .

types: install-dev  ## mypy on the package
	@echo "== mypy"; $(PY) -m mypy

# The package needs no browser; the tests that open report.html in one are skipped where there is none.
browser:  ## see to a browser for the tests of report.html (Debian's chromium, where we are root)
	@if [ -n "$${SHAPEDPO_BROWSER:-}" ] || command -v chromium chromium-browser google-chrome chrome >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "== no chromium or Chrome here: installing Debian's chromium with apt-get (about 100 MB)"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } \
	    >/dev/null && exit 0; \
	fi; \
	echo "== no chromium or Chrome here: the tests that open report.html in a browser will be skipped (install chromium, or name one in SHAPEDPO_BROWSER)"

pytest: install-dev browser  ## the tests alone
	@echo "== pytest ($(WORKERS) workers)"; $(PY) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# `make test` has each run on two processes only by the launchers where it can go wrong in its own way.
test-ranks: install-dev  ## every run on two processes by every launcher: DDP, ZeRO-1 to 3, FSDP2
	@SHAPEDPO_ALL_RANKS=1 $(PY) -m pytest tests/distributed $(PYTEST_ARGS)

format: install-dev  ## let ruff rewrite the code
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

bench: install  ## time a training step against TRL's
	@$(PY) benchmarks/overhead.py

# What .venv holds is what was tested. Local versions (+cpu, +cu130) are dropped: any build of that release is meant.
constraints: install-dev  ## write constraints.txt anew from .venv
	@{ sed -n '/^#/p' constraints.txt; $(PY) -m pip freeze --all --exclude-editable --exclude pip | sed 's/+.*//'; } > constraints.tmp
	@mv constraints.tmp constraints.txt

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
