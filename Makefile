# Two commands: `make quickstart` and `make test`. Both install what is missing into .venv first; `make install` does only that.
#
#   PYTHON=/path/to/python3.11   interpreter for .venv
#   TORCH_INDEX=URL              package index for torch, e.g. PyTorch's CPU index (see README: "Quickstart")

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
PY := $(VENV)/bin/python
TORCH_INDEX ?=
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all lint gpu-smoke bench clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(VENV)/.installed ## create .venv with the project and its exact dependencies

$(VENV)/.installed: setup.cfg constraints.txt tools/make_venv.sh
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" bash tools/make_venv.sh $(VENV)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@

quickstart: install ## corpus -> tokenizer -> shards -> four runs -> report (about ten minutes on two cores)
	@$(PY) -m pretrain.quickstart

test: $(VENV)/.installed-test ## the test suite (under 25 minutes on two cores)
	@$(PY) -m pytest

test-all: $(VENV)/.installed-test ## the test suite with the full product of model variants and layouts; its result in invariance.md
	@$(PY) -m pytest -m "" --invariance-table invariance.md

lint: $(VENV)/.installed-test ## ruff
	@$(PY) -m ruff check .

gpu-smoke: install ## 20 steps of tiny models on one GPU over NCCL against the CPU's losses
	@$(PY) -m pretrain.gpu_smoke

bench: install ## the figures of the README: tokenization, loader, training throughput, checkpoints
	@$(PY) -m data_tools.benchmark
	@$(PY) -m pretrain.benchmark
	@$(PY) -m pretrain.checkpoint.benchmark

clean: ## remove .venv and the quickstart's output
	rm -rf $(VENV) quickstart invariance.md
