# `make demo` and `make test` set up all they need, in .venv, the first time and whenever it changes.

PYTHON          ?= python3
TORCH           ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS            ?=

VENV := .venv
BIN  := $(VENV)/bin

# A test for each core at a time, with one thread each. Tests of one group share what is costly.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow check format clean

help:  ## show this
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 17
	@echo
	@echo 'ARGS="..." is passed on: make demo ARGS=--help, make test ARGS="-k causal".'
	@echo 'PYTHON=python3.12 chooses the interpreter of a new $(VENV).'

demo: build/extensions  ## train and distil a small model on real digits
	$(BIN)/python -m rcm.train $(ARGS)

test: check  ## check, then run the tests
	$(PYTEST) $(ARGS)

test-slow: build/extensions  ## run the tests that take long, such as the packaging
	$(PYTEST) -m slow $(ARGS)

.PHONY: test-exhaustive
test-exhaustive: build/extensions  ## run all exhaustive kernel tests, and record that they pass
	$(BIN)/python -m tests.kernels.exhaustive

check: build/extensions  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/ready  ## reformat, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove all that make made
	rm -rf $(VENV) build dist *.egg-info jvp_attn/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. A run that was interrupted leaves `unfinished` behind, and the next one starts anew.
$(VENV)/ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	@test ! -e $(VENV)/unfinished || rm -rf $(VENV)
	@mkdir -p $(VENV) && touch $(VENV)/unfinished && rm -f $@
	@echo 'Setting up $(VENV): a few minutes, once.'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet 'setuptools>=70.1' '$(TORCH)' $$($(cpu_index))
	JVP_ATTN_CPU=0 JVP_ATTN_CUDA=0 $(BIN)/pip install --quiet --no-build-isolation --editable '.[train,test,dev]' \
	  '$(TORCH)' $$($(cpu_index))
	@rm $(VENV)/unfinished && touch $@

# PyTorch's own index has CPU builds, right for a machine without a GPU. Where it does not answer
# within seconds, torch comes from pip's index, as all else does.
cpu_index = nvidia-smi >/dev/null 2>&1 || \
  $(BIN)/python -c 'from urllib.request import urlopen; \
  urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5); \
  print("--extra-index-url $(TORCH_CPU_INDEX)")' 2>/dev/null

# The extensions are built apart from the installation, so that only what changed is compiled.
# Where one is left out nothing is remembered: the next make looks for its compiler again.
build/extensions: $(VENV)/ready setup.py jvp_attn/backends/kernel_table.py $(shell find csrc -type f)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace
	@! ls jvp_attn/_C.*.so jvp_attn/_cpu.*.so >/dev/null 2>&1 || { mkdir -p build && touch $@; }
