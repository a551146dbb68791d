# make demo | test | test-all | lint | docs | bench | build | clean. Everything is set up in .venv on first use.
# make test: the quick tier, which shows that braze can replace torch here; test-all: every test.
# make gpu: what only a GPU can tell, in nine minutes, with the torch of $(PYTHON); python3 bench/gpu.py --help.
# make docs: the documentation in build/site; needs no torch and no build of braze.
# make wheel: one wheel for any number of torches and Pythons, ARGS="--torch 2.13,2.14"; docs/wheels.md.
# make wheel-check: builds such a wheel for two torches and tries it; nvcc if it is there, no GPU, 5 GB.
PYTHON ?= python3
# Any torch from 2.11 on: make test TORCH=torch==2.14.1
TORCH ?= torch==2.13.0
# WERROR=ON turns compiler warnings into errors.
WERROR ?= OFF
# Processes that run tests, a file at a time; JOBS=0: none but one, for a debugger.
JOBS ?= 2
ARGS ?=

BIN := .venv/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc cmake python bench -type f \
             ! -name '*.pyc' ! -path 'bench/results/*')
CXX_FILES := $(filter %.h %.cpp %.cuh %.cu,$(SOURCES) $(shell find tests -type f))
# venv/bin first: pip's cmake and ninja, not older ones of the system.
RUN := env PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONNOUSERSITE=1
# Most of what is installed is never imported; Python compiles the rest when it is.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-all lint docs bench gpu wheel wheel-check build clean format
build: .venv/built

demo: .venv/built
	$(BIN)/python -c 'import matplotlib, numpy, sklearn' 2>/dev/null || $(PIP) matplotlib numpy scikit-learn
	$(RUN) $(BIN)/python -m braze demo $(ARGS)

test-all: export BRAZE_TEST_ALL := 1
test-all: .venv/docs
test test-all: .venv/built .venv/tools
	$(RUN) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# A few rows of everything and one picture; ARGS="--filter AdamW" and so on.
bench: .venv/built
	$(BIN)/python -c 'import matplotlib, rich' 2>/dev/null || $(PIP) matplotlib rich
	$(RUN) $(BIN)/python -m braze bench all --quick --json build/bench.json --plot build/bench.png $(ARGS)

# Not in .venv: a GPU machine brings its own torch.
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

wheel: .venv/torch
	$(RUN) $(BIN)/python -m tools.wheel $(ARGS)

wheel-check: .venv/built .venv/tools
	$(RUN) $(BIN)/python tests/install/wheels.py

lint: .venv/built .venv/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# Material tells of another MkDocs on every run unless asked not to.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: .venv/tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("braze needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/torch: .venv/bin/python requirements-build.txt
	$(PIP) '$(TORCH)' -r requirements-build.txt
	touch $@

.venv/tools: .venv/torch requirements-dev.txt requirements-models.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-models.txt || \
	  echo "not all of requirements-models.txt: tests that need it will be skipped"
	touch $@

.venv/docs: .venv/bin/python requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	touch $@

.venv/built: .venv/torch $(SOURCES)
	$(RUN) $(PIP) --no-build-isolation --no-deps \
	  -C cmake.define.BRAZE_WERROR=$(WERROR) .
	touch $@

clean:
	rm -rf .venv build dist braze-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
