# Everything a contributor or CI runs. Each install happens once: a stamp file in the environment remembers it.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
NAME ?=
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)
METADATA := setup.py pyproject.toml $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-floor test-hub test-hub-floor test-contract test-matrix test-newest test-dist what-broke newest lint types format docs notebooks bench dist clean
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

# Threads that wait give their core away instead of spinning: on a machine that others use too, ten times faster.
demo: $(VENV)/.installed-demo ## train, evaluate, save, reload and generate with a small model: runs/demo
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hf-efficient demo --output runs/demo

test: $(VENV)/.installed-dev ## the quick tests
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.installed-dev ## soak, claims, matrix and fuzz tests
	$(BIN)/python -m pytest -m slow

test-floor: $(VENV)/floor.txt ## the quick tests with the oldest transformers we support
	$(MAKE) test VENV=$(VENV)/floor CONSTRAINTS=$<

test-hub: $(VENV)/.installed-dev $(VENV)/hub/.installed ## publish every model, load it where this package is not installed
	HF_EFFICIENT_CLEAN_PYTHON=$(abspath $(VENV))/hub/bin/python $(BIN)/python -m pytest -m slow tests/hub

test-hub-floor: $(VENV)/floor.txt ## the same with the oldest transformers we support
	$(MAKE) test-hub VENV=$(VENV)/floor CONSTRAINTS=$<

test-contract: $(VENV)/.installed-dev ## what every model does with everything else; the results stand in the documentation
	HF_EFFICIENT_CONTRACT=docs/site/contract.json $(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow" tests/contract

test-matrix: test-contract $(VENV)/floor.txt ## the same with the newest transformers and with the oldest that we support
	$(MAKE) test-contract VENV=$(VENV)/floor CONSTRAINTS=$(VENV)/floor.txt

test-newest: newest ## the quick tests with the newest transformers on the index
	$(MAKE) test VENV=$(VENV)/newest CONSTRAINTS=$(VENV)/newest.txt

what-broke: newest ## what of the newest transformers is no longer as we use it
	$(VENV)/newest/bin/python .ci/what_broke.py

test-dist: $(VENV)/.installed-dev ## build a release, install it in a fresh environment, run README's first programs there
	$(BIN)/python -m pytest -m slow tests/test_dist.py

lint: $(VENV)/.installed-lint ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## mypy: the type hints of everything but model bodies
	$(BIN)/python -m mypy

format: $(VENV)/.installed-lint ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs ## the documentation site, in build/docs; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml

notebooks: $(VENV)/.installed-notebooks ## run all notebooks from top to bottom; a cell that fails is an error
	$(BIN)/python notebooks/execute.py --jobs $(JOBS)

bench: $(VENV)/.installed-dev ## one benchmark: make bench NAME=xl_decode
	$(BIN)/python benchmarks/run.py $(NAME)

dist: $(VENV)/.installed-dev ## sdist and wheel of a release, in dist/, checked by twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## remove the environment, caches and build output (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the pin picks the CPU build where one is offered, and nothing else may choose another.
$(VENV)/.installed-torch: $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) "$$(grep '^torch==' $(CONSTRAINTS))"
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.installed-torch $(METADATA)
	$(PIP_INSTALL) --editable '.[train,plots]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch $(METADATA)
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-torch $(METADATA)
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.installed-notebooks: $(VENV)/.installed-torch $(METADATA)
	$(PIP_INSTALL) --editable '.[notebooks]'
	@touch $@

$(VENV)/.installed-lint: $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) ruff
	@touch $@

# constraints.txt with the lowest transformers that setup.py allows.
$(VENV)/floor.txt: constraints.txt setup.py
	@mkdir -p $(@D)
	floor=$$(sed -nE 's/.*"transformers>=([0-9.]+),.*/\1.0/p' setup.py) && \
	sed "s/^transformers==.*/transformers==$$floor/" constraints.txt > $@

# An environment with the newest transformers, even one that setup.py does not allow yet; looked up each time.
newest:
	@mkdir -p $(VENV)
	grep -vE '^(transformers|huggingface_hub|tokenizers|safetensors|accelerate)==' constraints.txt > $(VENV)/newest.txt
	$(MAKE) $(VENV)/newest/.installed-dev VENV=$(VENV)/newest CONSTRAINTS=$(VENV)/newest.txt
	$(VENV)/newest/bin/python -m pip install --quiet --upgrade --constraint $(VENV)/newest.txt transformers

# What someone has who only wants to use a published model.
$(VENV)/hub/.installed: $(CONSTRAINTS) | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/hub
	$(VENV)/hub/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) "$$(grep '^torch==' $(CONSTRAINTS))"
	$(VENV)/hub/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) transformers
	@touch $@
