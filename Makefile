# Every target works in .venv, which is made from requirements.lock when it is missing or stale.
# Nothing outside the repository is changed.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/lock.sha256
# What the environment was made of, and where: a moved or copied one has scripts that start another's Python.
STATE  = { cat requirements.lock pyproject.toml; echo "$(CURDIR)"; readlink -f $(BIN)/python; } 2>&1 | sha256sum
PIP    = $(BIN)/python -m pip install -qq --disable-pip-version-check

SHELL         := /bin/bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS     += --no-print-directory

# The text encoder and the image features are packages: nothing is ever looked up on a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: help demo test check bench fashion-mnist clean venv

help:  ## what can be made
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1 \t/' | expand -t 24

demo: venv  ## pictures -> data set -> sweep -> training -> registry -> an image over HTTP
	@echo "==> demo: $(BIN)/darkroom demo"
	@$(BIN)/darkroom demo

test: venv  ## the whole default test suite
	@echo "==> test: pytest"
	@$(BIN)/python -m pytest

check: venv  ## formatting, lint, types, and which package may import which
	@echo "==> check: ruff format"
	@$(BIN)/ruff format --check .
	@echo "==> check: ruff"
	@$(BIN)/ruff check .
	@echo "==> check: mypy --strict"
	@$(BIN)/mypy
	@echo "==> check: layout and import direction"
	@$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layout.py

bench: venv  ## the benchmarks, with their figures printed
	@for name in startup loader data_build overhead checkpoint; do \
	    echo "==> bench: python -m tests.benchmarks.$$name"; \
	    $(BIN)/python -m tests.benchmarks.$$name; \
	done

# Debian's package is unpacked, not installed: nobody has to be root. MIT; 31 MB to fetch, 160 MB as a tar of PNGs.
FASHION     := .darkroom/fashion-mnist
FASHION_SET := .darkroom/data/fashion-mnist
fashion-mnist: venv  ## a data set of 70,000 small pictures, from Debian's package; in .darkroom/data/fashion-mnist
	@if [ ! -e $(FASHION)/fashion-mnist.tar ]; then \
	    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || \
        { echo "apt-get and dpkg-deb are needed: a Debian machine" >&2; exit 1; }; \
	    echo "==> fashion-mnist: fetching Debian's dataset-fashion-mnist"; \
	    rm -rf $(FASHION); mkdir -p $(FASHION)/deb; \
	    (cd $(FASHION)/deb && apt-get -q download dataset-fashion-mnist); \
	    dpkg-deb -x $(FASHION)/deb/dataset-fashion-mnist_*.deb $(FASHION)/deb; \
	    echo "==> fashion-mnist: idx files -> $(FASHION)/fashion-mnist.tar"; \
	    $(BIN)/python -m training.data.fashion_mnist $(FASHION)/deb/usr/share/datasets/fashion-mnist \
	        $(FASHION)/fashion-mnist.tar; \
	    rm -rf $(FASHION)/deb; fi
	@echo "==> fashion-mnist: darkroom data build"
	@$(BIN)/darkroom data build $(FASHION)/fashion-mnist.tar $(FASHION_SET)

clean:  ## stop the local stack and remove .venv, caches and build leftovers; .darkroom stays
	@if [ -e .darkroom/stack.json ]; then \
	    echo "==> clean: stopping the local stack"; \
	    $(BIN)/python -m cluster down || echo "==> clean: $(BIN) does not work, so nothing was stopped:" \
	        "if a stack still runs, \`make venv\` and then \`$(BIN)/darkroom down\` stop it" >&2; fi
	@echo "==> clean: removing .venv and caches (your runs in .darkroom are kept)"
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find cluster serving training tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Whatever has no valid stamp is made from nothing. The stamp is written last, so an interrupted install is made again.
# torch's CUDA build needs packages that torch itself names; the lock leaves them out, because the CPU build has none.
venv:
	@if $(BIN)/python -c '' 2>/dev/null && [ "$$(cat $(STAMP) 2>/dev/null)" = "$$($(STATE))" ]; then exit 0; fi; \
	echo "==> environment: $(VENV) is missing or stale; making it from requirements.lock (minutes)"; \
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; set PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	$(PYTHON) -m venv --clear $(VENV); \
	$(PIP) --no-deps -r requirements.lock; \
	if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    echo "==> environment: this torch is a CUDA build; adding the CUDA packages that it names (GB)"; \
	    $(PIP) -c requirements.lock "$$(grep '^torch==' requirements.lock)"; \
	    $(BIN)/python -c 'import torch'; \
	fi; \
	echo "==> environment: darkroom itself, editable"; \
	$(PIP) --no-deps --no-build-isolation --editable .; \
	$(STATE) > $(STAMP); \
	echo "==> environment: ready"
