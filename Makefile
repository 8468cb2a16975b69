# SPDX-License-Identifier: Apache-2.0
# make bench   set up, then the main job: a real clip through a model unpatched and patched, and quick benchmarks -> report/
# make test    set up, then the quick test suite
# make lint    ruff, clang-format, mypy
# Needs Python 3.11 or newer, as diffusers 0.42 does; the package itself runs on 3.10.
# PYTHON, VENV, TORCH and EXTRA_PIP can be given on the command line, e.g. `make test PYTHON=python3.12 TORCH="torch>=2.10"`.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRA_PIP ?=
RUN := $(VENV)/bin/python
# Modules are compiled when they are first imported: compiling all that is installed takes 43 s, of which tests need few. Where the
# environment forbids keeping them, each process of the suite would compile torch anew (5.9 s of a core to import it, not 2.6).
export PYTHONDONTWRITEBYTECODE :=
PIP := $(RUN) -m pip install --quiet --no-compile --disable-pip-version-check $(EXTRA_PIP)
NATIVE := setup.py pyproject.toml csrc/build.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)
# Two workers of one thread each: tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -W ignore -m pytest -n 2
# This machine's GPUs, or one architecture to prove that the kernels compile; `pip install .` builds the whole list.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd';' -)
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPUS),9.0a)

.PHONY: bench test test-slow lint clean

bench: $(VENV)/built
	$(RUN) -m vidkernels demo --out report

test: $(VENV)/built
	$(PYTEST) -q

test-slow: $(VENV)/built
	$(PYTEST) -q --slow

# `built` has compiled everything: the tools alone are installed.
lint: $(VENV)/built
	VIDKERNELS_SKIP_CPU_BUILD=1 $(PIP) -e ".[dev]" --no-build-isolation
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
	$(RUN) -m mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

$(VENV)/packages: pyproject.toml
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit(f'vidkernels: $(PYTHON) is {sys.version.split()[0]}; \
	diffusers 0.42, which the tests and the demo use, needs Python 3.11: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "setuptools>=77" wheel "pybind11>=2.12" "ninja>=1.11"
	$(RUN) -c "import torch" 2>/dev/null || $(PIP) "$(TORCH)"
	touch $@

# Two steps, so that a dependency that fails to install is not mistaken for a failed build and neither is hidden. They run side
# by side: one waits for the network while the other compiles, and make names the one that failed.
MAKEFLAGS += --jobs=2

$(VENV)/native: $(VENV)/packages $(NATIVE)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) setup.py build_ext --inplace
	touch $@

$(VENV)/installed: $(VENV)/packages
	PATH="$(abspath $(VENV))/bin:$$PATH" VIDKERNELS_SKIP_CPU_BUILD=1 $(PIP) -e ".[test,demo,triton]" --no-build-isolation
	touch $@

$(VENV)/built: $(VENV)/native $(VENV)/installed
	$(RUN) -c "import vidkernels.ops, pytest, diffusers"
	touch $@

clean:
	rm -rf build $(VENV) report *.egg-info vidkernels/*.so vidkernels/_build_info.json
