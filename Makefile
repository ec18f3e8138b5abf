# `make demo` and `make test` set everything up on a machine with Python ≥ 3.11, pip, make and a C++ compiler.
#
#   PYTHON=python3.12   the interpreter that makes the environment
#   TORCH=torch==2.13.0 the torch to install first; set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels to avoid the CUDA packages

SHELL := /bin/bash
# Idle OpenMP threads sleep instead of spinning: on a busy 2-core machine a training step took 2.0-3.0 s with spinning, 0.4 s without.
export OMP_WAIT_POLICY ?= PASSIVE
# Here a compiler's warnings are errors; for whoever installs the package with another compiler they are not.
export TRAPO_WERROR ?= 1
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python
# A process per core, four at most (a container may have fewer than it sees); what a file's tests share is made once. In
# their order: by the number of their tests, few long ones would run alone at the end.
PYTEST := $(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Where the gpu- targets write, a few files only, and how long they may take; QUESTIONS="trapo scoring" narrows gpu-bench.
OUT ?= benchmarks/results
GPU_SECONDS ?= 500
GPU_MINUTES ?= 8.5
GPU_ARCH = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | sed 's/\.//; s/^90$$/90a/')
# The GPU machine's own interpreter serves where no environment was made: it brings a CUDA torch.
GPU_RUN := $(shell [ -x $(VENV)/bin/python ] && echo $(VENV)/bin/python || command -v python3)

SANITIZED = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 ../../$(RUN) -m pytest -q

.PHONY: help demo test test-fast lint format asan doctor gpu-native gpu-test gpu-bench clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | column -t -s $$'\t'

$(VENV)/.ready: pyproject.toml $(wildcard csrc/*.* csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"trapo needs Python 3.11 or newer, found {sys.version.split()[0]}. Pass PYTHON=/path/to/python3.11.")'
	@echo "== environment: $(VENV), with $(TORCH) (once, 1-2 minutes)"
	@[ -x $(RUN) ] || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/.ready  ## train a base model, then TRAPO from it, on a laptop CPU; about 5 minutes, plots in runs/demo
	@$(VENV)/bin/trapo-train demo --output runs/demo

test: $(VENV)/.ready  ## every test that this machine can run
	@echo "== the whole suite (make test-fast leaves out the slow ones)"
	@$(PYTEST)

test-fast: $(VENV)/.ready  ## the default subset, without `slow`
	@$(PYTEST) -m "not slow"

lint: $(VENV)/.ready  ## ruff, check only
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

format: $(VENV)/.ready  ## ruff, in place
	@$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

asan: $(VENV)/.ready  ## the native tests, CUDA kernels on the host included, with address and undefined-behaviour sanitizers; about 2 minutes
	@rm -rf build/asan && mkdir -p build/asan && cp -r benchmarks csrc trapo_kernels tests pyproject.toml build/asan/ && rm -f build/asan/trapo_kernels/*.so
	@TRAPO_SANITIZE=1 $(RUN) -c 'import setuptools; setuptools.setup()' --quiet build_ext --build-lib build/asan --build-temp build/asan/objects
	@cd build/asan && $(SANITIZED) -m "not slow" -k "native or auto or cpu_gemm or in_weight" tests/trapo_kernels
	@cd build/asan && $(SANITIZED) -k "not missing_barrier and not registers" tests/trapo_kernels/test_native_on_host.py

doctor: $(VENV)/.ready  ## what is installed, which backends run here and why the others do not
	@$(RUN) -m trapo_kernels.doctor

gpu-native:  ## build the native backend's CUDA part in place, for this machine's GPU; then gpu-test and gpu-bench include it
	@$(GPU_RUN) -c 'import setuptools; v = setuptools.__version__; raise SystemExit(0 if int(v.split(".")[0]) >= 77 else f"gpu-native: setuptools must be 77 or newer, which can read pyproject.toml, got {v}. Put a newer one on PYTHONPATH.")'
	@TRAPO_WERROR=0 TRAPO_CUDA=1 TRAPO_CUDA_ARCHS="$${TRAPO_CUDA_ARCHS:-$(GPU_ARCH)}" $(GPU_RUN) -c 'import setuptools; setuptools.setup()' --quiet build_ext --inplace

gpu-test:  ## kernel correctness and compute-sanitizer on a CUDA device, under 9 minutes; writes OUT/<gpu>/tests.md, sanitizer.txt
	@PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_RUN) -m benchmarks.gpu_test --out $(OUT) --seconds $(GPU_SECONDS)

gpu-bench:  ## the GPU tables, under 9 minutes a call; writes OUT/<gpu>/results.jsonl and goes on from the one in benchmarks/results
	@for old in benchmarks/results/nvidia-*/results.jsonl; do new=$(OUT)/$${old#benchmarks/results/}; \
		if [ -e $$old ] && [ ! -e $$new ]; then mkdir -p $${new%/*} && cp $$old $$new; fi; done
	@PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_RUN) -m benchmarks --device cuda --budget $(GPU_MINUTES) --out $(OUT) --no-report $(QUESTIONS)

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs build *.egg-info
