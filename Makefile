# Two commands: `make quickstart` and `make test`. Both install what is missing into .venv first; `make install` does only that.
#
#   PYTHON=/path/to/python3.11   interpreter for .venv
#   PYTHON312=/path/to/python3.12 interpreter for `make test-py312`
#   TORCH_INDEX=URL              package index for torch, e.g. PyTorch's CPU index (see README: "Quickstart")

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
PY := $(VENV)/bin/python
PYTHON312 ?= $(shell for p in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
TORCH_INDEX ?=
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all test-py312 lint gpu-smoke bench clean

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

test-py312: ## the test suite on Python 3.12 with megatron-core 0.19, in .venv-py312 (12 GB with the default build of torch)
	@[ -n "$(PYTHON312)" ] || { echo "error: no Python 3.12 found: install it, or name one with PYTHON312=/path/to/python3.12" >&2; exit 1; }
	@$(MAKE) --no-print-directory test VENV=.venv-py312 PYTHON="$(PYTHON312)"

lint: $(VENV)/.installed-test ## ruff
	@$(PY) -m ruff check .

gpu-smoke: install ## 20 steps of tiny models on one GPU over NCCL against the CPU's losses
	@$(PY) -m pretrain.gpu_smoke

bench: install ## the figures of the README: tokenization, loader, training throughput, checkpoints
	@$(PY) -m data_tools.benchmark
	@$(PY) -m pretrain.benchmark
	@$(PY) -m pretrain.benchmark --modes --tensor 2
	@$(PY) -m pretrain.checkpoint.benchmark

clean: ## remove the environments and the quickstart's output
	rm -rf $(VENV) .venv-py312 quickstart invariance.md
