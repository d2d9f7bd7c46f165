# Every target does its own set-up: `make test` and `make demo` work in a fresh clone.
#   make PYTHON=python3.12           another interpreter
#   make TORCH="torch==2.13.0+cpu"   another build of torch (PIP_INDEX_URL and its like are pip's own)

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
TORCH_CUDA ?= torch==2.14.1
OLDEST_TORCH  ?= torch==2.6.0
OLDEST_PYTHON ?= python3.10

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE  := $(shell find csrc tests -name "*.cpp" -o -name "*.h" -o -name "*.cu")
CUDA    := $(filter %.cu,$(NATIVE))
# A process for each core; each has a run of neighbours, which share what a module of tests makes once.
PYTEST  := $(BIN)/python -m pytest -q -n auto --dist worksteal
SOURCES := $(wildcard setup.py pyproject.toml) $(filter csrc/%,$(NATIVE))

.PHONY: help venv install demo test check test-quick test-oldest test-emulation test-gpu cuda cuda-link bench bench-ops lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make install   build the extension and install the package into $(VENV), editable"
	@echo "make demo      train on Glyphs, then evaluate and draw: demo/*.png and a checkpoint"
	@echo "make check     formatters, linters, types, quick tests: 100 s on two cores once built"
	@echo "make test      that, native sanitizers, the GPU engine in an emulation, slow tests, and nvcc where it is"
	@echo "make test-oldest  the tests of make check with torch $(OLDEST_TORCH) and $(OLDEST_PYTHON), in $(VENV)-oldest"
	@echo "make test-emulation  the GPU engine on the host by every test of the fused engine, of which make test takes a sample"
	@echo "make test-gpu  build for the GPU that is here, check every kernel on it, then time it (needs CUDA torch and nvcc)"
	@echo "make cuda-link build with CUDA against $(TORCH_CUDA) in $(VENV)-cuda and import it; needs nvcc, 6 GB, no GPU"
	@echo "make lint      formatters, linters, types"
	@echo "make cuda      compile the CUDA sources where there is nvcc"
	@echo "make bench     time the workloads here and in other libraries, which it installs: bench/ (BENCH=\"--list\": which)"
	@echo "make bench-ops time single ops beside plain torch"
	@echo "make format    reformat Python and C++"
	@echo "make clean     remove what was built, but not $(VENV)"

venv: $(VENV)/.tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "metaaug_fast needs Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu, python3-venv) and run make again"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.tools: Makefile | $(BIN)/python
	@echo "installing $(TORCH) and build tools into $(VENV)"
	@$(PIP) $(TORCH) 'setuptools>=77' wheel 'pybind11>=3' ninja
	@touch $@

install: $(VENV)/.package

# Editable, so only a change of native sources or metadata asks for a new build.
$(VENV)/.package: $(SOURCES) | $(VENV)/.tools
	@set -- $${CXX:-c++}; command -v "$$1" >/dev/null || \
	    { echo "metaaug_fast needs a C++17 compiler and found no '$$1': install g++ or clang++, or set CXX"; exit 1; }
	@echo "building metaaug_fast"
	@$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@

demo: install
	$(BIN)/metaaug-fast demo --out demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
ifneq ($(NATIVE),)
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
endif

# Without torch and without a GPU.
ifneq ($(shell command -v nvcc),)
cuda: $(CUDA:%.cu=build/%.o)
else
cuda:
	@echo "no nvcc: the CUDA sources are not compiled here"
endif

build/%.o: %.cu $(filter csrc/%.h,$(NATIVE))
	@echo "compiling $<"
	@mkdir -p $(@D)
	@nvcc -std=c++17 -c -Icsrc -Werror all-warnings -gencode=arch=compute_80,code=sm_80 -o $@ $<

check: lint test-quick

test: install
	@$(MAKE) --no-print-directory -j2 lint cuda
	$(PYTEST)

test-quick: install
	$(PYTEST) -m "not slow"

# What is promised at least.
test-oldest:
	@METAAUG_CUDA=0 $(MAKE) --no-print-directory test-quick VENV=$(VENV)-oldest TORCH="$(OLDEST_TORCH)" PYTHON="$(OLDEST_PYTHON)"

test-emulation: install
	METAAUG_EMULATION_TESTS=all $(PYTEST) tests/engine/test_emulation.py

# With the interpreter that has a CUDA build of torch: a machine with a GPU may have no network for an environment of ours.
test-gpu:
	arch=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())'); \
	    METAAUG_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$arch} $(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -q tests/engine/test_gpu.py
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --seconds 180 $(if $(OUT),--out $(OUT))
	METAAUG_GPU_CASES=6 PYTHONPATH=. compute-sanitizer --tool memcheck --error-exitcode 1 --quiet $(PYTHON) -m pytest -q tests/engine/test_gpu.py -k networks
	METAAUG_GPU_CASES=6 PYTHONPATH=. compute-sanitizer --tool racecheck --error-exitcode 1 --quiet $(PYTHON) -m pytest -q tests/engine/test_gpu.py -k networks

# A build for CUDA needs no GPU, and neither does importing it.
cuda-link:
	@$(MAKE) --no-print-directory venv VENV=$(VENV)-cuda TORCH="$(TORCH_CUDA)"
	@echo "building metaaug_fast with CUDA"
	@METAAUG_CUDA=1 $(VENV)-cuda/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation .
	@cd $(VENV)-cuda && bin/python -c 'import metaaug_fast; from metaaug_fast import _C; assert _C.cuda; print(metaaug_fast.__file__, "has the CUDA engine")'

# learn2learn has no release that pip can build: see its row in the table.
bench: $(VENV)/.bench-all
	$(BIN)/metaaug-fast bench $(BENCH)

bench-ops: $(VENV)/.bench
	$(BIN)/python -m pytest -q benchmarks --benchmark-sort=name --benchmark-columns=median,iqr,rounds

# metaaug_fast itself is there already, so only what the extra names is installed.
$(VENV)/.bench $(VENV)/.bench-all: $(VENV)/.package
	@echo "installing metaaug_fast[$(@:$(VENV)/.%=%)] into $(VENV)"
	@$(PIP) 'metaaug_fast[$(@:$(VENV)/.%=%)]'
	@touch $@

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
ifneq ($(NATIVE),)
	$(BIN)/clang-format -i $(NATIVE)
endif

clean:
	rm -rf build dist demo bench *.egg-info metaaug_fast/*.so $(VENV)/.package
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
