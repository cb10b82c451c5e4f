# One entry for everything. The environment is .venv, made here; `make run` and `make test` set up all they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
GPU_PYTHON ?= $(BIN)/python
ARGS ?=

.PHONY: run test check bench bench-policies gpu clean

run: $(VENV)/.run
	$(BIN)/sluice serve $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m bench.decode_prefill $(ARGS)

# make bench-policies TRACE=mooncake_conversation.jsonl.gz ARGS="--share 0.25"
bench-policies: $(VENV)/.bench
	$(BIN)/python -m bench.policies --trace $(TRACE) --rows policies.jsonl $(ARGS)
	$(BIN)/python -m bench.policies --rows policies.jsonl --report

# On a host whose Python has torch with CUDA: make gpu GPU_PYTHON=python3
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.bench)
	$(GPU_PYTHON) -m pytest -q -m gpu tests/gpu
	$(GPU_PYTHON) -m bench.gpu $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find app engine kvstore policies tests bench training -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sluice needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: a range would be free to pick a CUDA build
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) --constraint constraints.txt --editable '.[bench]'
	@touch $@
