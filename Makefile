# `make demo` and `make test` set up what they need in .venv and build/, the first time and whenever
# it changes.

PYTHON          ?= python3
TORCH           ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS            ?=

VENV := .venv
BIN  := $(VENV)/bin

# One test per core at a time, with one thread each. Tests of one group run in the same process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadgroup

# The longest single tests are in tests/rcm: they start first, so that no core waits for them.
TEST_FOLDERS := tests/rcm/ $(filter-out tests/rcm/ %/__pycache__/,$(wildcard tests/*/))

CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
CPU_FILES := $(shell find csrc/cpu -type f)

# The demo compiles CUDA kernels only for a GPU that is present, or with JVP_ATTN_CUDA=1.
USES_GPU := $(or $(filter 1,$(JVP_ATTN_CUDA)),$(shell nvidia-smi -L 2>/dev/null | grep GPU))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# V=1 shows the commands of compilers and the output of pip; without it pip prints errors only.
ifeq ($(V),1)
QUIET :=
PIP_QUIET :=
else
QUIET := --quiet
PIP_QUIET := --quiet --quiet
endif

.PHONY: help demo demo-scale test test-attn test-kernels test-rcm test-slow test-exhaustive check format clean

help:  ## show this
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21
	@echo
	@echo 'ARGS="..." is passed on: make demo ARGS=--help, make test ARGS="-k causal".'
	@echo 'PYTHON=python3.12 chooses the interpreter of a new $(VENV).'
	@echo 'V=1 shows the commands of compilers.'

demo: $(VENV)/ready build/cpu $(if $(USES_GPU),build/cuda)  ## train and distil a small model on real digits
	$(BIN)/python -m rcm.train $(ARGS)

demo-scale: $(VENV)/ready-diffusers build/cpu  ## distil on two ranks, kill them, finish on one: the same losses
	$(BIN)/python benchmarks/demo_scale.py $(ARGS)

test: check build/cpu build/cuda  ## check, build for CPU and GPU, run the default tests
	$(PYTEST) $(ARGS)

test-attn: $(VENV)/ready-test build/cpu  ## run the default tests of jvp_attn
	$(PYTEST) tests/jvp_attn tests/cpu tests/models $(ARGS)

test-kernels: $(VENV)/ready-test build/cpu  ## run the default tests of the CUDA kernels, in the emulator
	$(PYTEST) tests/kernels tests/emulator tests/gpu tests/compile_gate tests/cute $(ARGS)

test-rcm: $(VENV)/ready-test build/cpu  ## run the default tests of rcm
	$(PYTEST) tests/rcm tests/distributed $(ARGS)

test-slow: $(VENV)/ready-test build/cpu build/cuda  ## run the tests that take long, such as the packaging
	$(PYTEST) -m slow $(TEST_FOLDERS) $(ARGS)

test-exhaustive: $(VENV)/ready-test  ## run all exhaustive kernel tests, and record that they pass
	$(BIN)/python -m tests.kernels.exhaustive

check: $(VENV)/ready-test  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/ready-test  ## reformat, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	@$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove everything that make built
	rm -rf $(VENV) build dist *.egg-info jvp_attn/*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ------------------------------------------------------------------------------
# Set-up. `ready` has what the demo needs, `ready-diffusers` also what demo-scale needs, `ready-test`
# also what the tests need. An interrupted run leaves `unfinished` behind; the next one starts anew.
$(VENV)/ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...'; exit 1; }
	@test ! -e $(VENV)/unfinished || rm -rf $(VENV)
	@mkdir -p $(VENV) && touch $(VENV)/unfinished && rm -f $@
	@echo 'Setting up $(VENV): a minute or two, once.'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_QUIET) 'setuptools>=70.1' pybind11 ninja '$(TORCH)' $$($(cpu_index))
	@$(call install,train)
	@rm $(VENV)/unfinished && touch $@

$(VENV)/ready-diffusers: $(VENV)/ready
	@echo 'Setting up $(VENV) for networks of diffusers: half a minute, once.'
	@$(call install,train$(comma)diffusers)
	@touch $@

$(VENV)/ready-test: $(VENV)/ready
	@echo 'Setting up $(VENV) for tests: a minute or two, once.'
	@$(call install,train$(comma)test$(comma)dev)
	@touch $@

comma := ,
install = JVP_ATTN_CPU=0 JVP_ATTN_CUDA=0 $(BIN)/pip install $(PIP_QUIET) --no-build-isolation \
  --editable '.[$(1)]' '$(TORCH)' $$($(cpu_index))

# PyTorch's own index has CPU builds, for machines without a GPU. Where it does not answer within
# seconds, torch comes from pip's index.
cpu_index = nvidia-smi >/dev/null 2>&1 || \
  $(BIN)/python -c 'from urllib.request import urlopen; \
  urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=5); \
  print("--extra-index-url $(TORCH_CPU_INDEX)")' 2>/dev/null

# The extensions are built in place, so that only what changed is compiled. A skipped extension
# leaves no stamp: the next make looks for its compiler again.
build/cpu: $(VENV)/ready setup.py $(CPU_FILES)
	@test -e $@ || echo 'Compiling the CPU kernels: a minute, once.'
	@JVP_ATTN_CUDA=0 $(BIN)/python setup.py $(QUIET) build_ext --inplace
	@! ls jvp_attn/_cpu.*.so >/dev/null 2>&1 || { mkdir -p build && touch $@; }

build/cuda: $(VENV)/ready setup.py jvp_attn/backends/kernel_table.py $(shell find csrc -type f)
	@test -e $@ || echo 'Compiling the CUDA kernels: six to ten minutes on two cores, once.'
	@JVP_ATTN_CPU=0 $(BIN)/python setup.py $(QUIET) build_ext --inplace
	@! ls jvp_attn/_C.*.so >/dev/null 2>&1 || { mkdir -p build && touch $@; }
