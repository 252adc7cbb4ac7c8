# Two commands: `make quickstart` and `make test`. Both install what is missing into .venv first; `make install` does only that.
# In a container that brings its own torch: `make install-into-current`.
#
#   PYTHON=/path/to/python3.11   interpreter for .venv
#   PYTHON312=/path/to/python3.12 interpreter for `make test-py312`
#   TORCH_INDEX=URL              package index for torch, e.g. PyTorch's CPU index (see README: "Quickstart")
#   OFFLINE=DIR                  install from this folder of `make wheelhouse`, without any network
#   WHEELHOUSE=DIR FOR=current   where `make wheelhouse` collects, and that it is for an environment that has torch itself
#   PLAN=1                       `make install-into-current` shows what it would do, and stops
#   CACHE=DIR                    where `make prebuild` puts what it compiles

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
PY := $(VENV)/bin/python
PYTHON312 ?= $(shell for p in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do "$$p" -c "" 2>/dev/null && echo "$$p" && break; done)
TORCH_INDEX ?=
OFFLINE ?=
WHEELHOUSE ?= wheelhouse
FOR ?=
CACHE ?= .prebuilt
# The active environment's, unless PYTHON was given.
CURRENT := $(if $(filter file,$(origin PYTHON)),,$(PYTHON))
PIP := $(if $(OFFLINE),PIP_CONFIG_FILE=/dev/null )$(PY) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt $(if $(OFFLINE),--no-index --find-links "$(OFFLINE)")

.DEFAULT_GOAL := help
.PHONY: help install install-into-current wheelhouse prebuild check-venv quickstart test test-slurm test-all test-py312 lint gpu-smoke bench clean

help:
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

install: $(VENV)/.installed ## create .venv with the project and its exact dependencies

$(VENV)/.installed: setup.cfg constraints.txt tools/make_venv.sh | check-venv
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" OFFLINE="$(OFFLINE)" bash tools/make_venv.sh $(VENV)
	@if [ -n "$(TORCH_INDEX)" ] || [ ! -f $@ ]; then echo "$(TORCH_INDEX)" > $@; else touch $@; fi

check-venv:
	@bash tools/check_venv.sh $(VENV) "$(CURRENT)" "$(TORCH_INDEX)"

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@touch $@

install-into-current: ## into the active environment, leaving its torch, numpy and CUDA packages alone
	@PYTHON="$(CURRENT)" bash tools/install_into_current.sh $(if $(OFFLINE),--offline "$(OFFLINE)") $(if $(PLAN),--plan)

wheelhouse: ## a folder of every wheel, for `make install OFFLINE=DIR`; FOR=current: what the active environment lacks
	@PYTHON="$(if $(filter current,$(FOR)),$(CURRENT),$(PYTHON))" TORCH_INDEX="$(TORCH_INDEX)" FOR="$(FOR)" bash tools/make_wheelhouse.sh "$(WHEELHOUSE)"

prebuild: ## compile beforehand what training would compile when it starts, and prove that nothing is left
	@PYTHON="$(CURRENT)" bash tools/prebuild.sh $(VENV) "$(CACHE)"

quickstart: install ## corpus -> tokenizer -> shards -> four runs -> report (about ten minutes on two cores)
	@$(PY) -m pretrain.quickstart

test: $(VENV)/.installed-test ## the test suite (under 25 minutes on two cores)
	@$(PY) -m pytest

test-slurm: $(VENV)/.installed-test ## real jobs on a real Slurm cluster on this machine (about 30 minutes); how fast they went on in slurm.md
	@$(PY) -m pytest tests/slurm -m "" --slurm-log slurm.md

test-all: $(VENV)/.installed-test ## all tests: the full product of model variants and layouts too; results in invariance.md, kills.md, slurm.md
	@$(PY) -m pytest -m "" --invariance-table invariance.md --kill-log kills.md --slurm-log slurm.md

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
	rm -rf $(VENV) .venv-py312 quickstart invariance.md kills.md slurm.md .prebuilt
