# Every target sets up what it needs, is safe to repeat, and does nothing that is already done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TARGETS := setup run test bench check sanitize soak clean

PACKAGES := collectives transports parallel kernels
NATIVE_SOURCES := $(shell find $(PACKAGES) -name '*.cpp' -o -name '*.hpp' -o -name CMakeLists.txt)
PACKAGE_ROOTS := $(wildcard $(PACKAGES:%=%/__init__.py))
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"

TRAIN_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
BENCH_GLOO ?=
SOAK_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help $(TARGETS)

help:
	@echo "make setup     virtual environment in $(VENV), dependencies, native code"
	@echo "make run       train a small GPT on four ranks in two layouts, and check it"
	@echo "make test      every test (TEST_ARGS='-k ring' selects)"
	@echo "make bench     comparison with the peers on 2 and 4 ranks (BENCH_ARGS='all_reduce --sizes 8,1M'; BENCH_GLOO=1 installs PyTorch, and compares trainings too)"
	@echo "make check     ruff, mypy --strict, clang-format"
	@echo "make sanitize  native code under the address, undefined-behaviour and thread sanitizers"
	@echo "make soak      the property tests with thousands of examples, and messages beyond 2 GiB"
	@echo "make clean     remove everything that was built"

.DEFAULT:
	$(error there is no target '$@'; the targets are: $(TARGETS))

# What the machine lacks, as one line; empty when nothing is missing.
missing = $(strip $(shell \
    if ! command -v $(PYTHON) >/dev/null 2>&1; then \
        echo 'Python 3.11 or newer is missing ($(PYTHON) was not found): apt-get install python3 python3-venv python3-dev'; \
    elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
        echo "Python 3.11 or newer is needed and $(PYTHON) is `$(PYTHON) --version 2>&1`: install a newer one and name it, as in 'make PYTHON=python3.12 setup'"; \
    elif ! $(PYTHON) -c 'import ensurepip, venv' >/dev/null 2>&1; then \
        echo 'the Python modules venv and ensurepip are missing: apt-get install python3-venv'; \
    elif ! command -v $(firstword $(CXX)) >/dev/null 2>&1; then \
        echo 'a C++20 compiler is missing ($(CXX) was not found): apt-get install g++'; \
    elif ! test -f "`$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'`/Python.h"; then \
        echo 'the headers of Python (Python.h) are missing: apt-get install python3-dev'; \
    fi))

setup: $(VENV)/.installed $(VENV)/.mpich

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(NATIVE_SOURCES) $(PACKAGE_ROOTS)
	$(if $(missing),$(error $(missing)))
	@echo "setting up $(VENV) (the first time takes a minute or two)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" \
	    | xargs -d '\n' $(BIN)/python -m pip install -qq --disable-pip-version-check cmake ninja
	@CXX="$(CXX)" $(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --editable '.[dev]'
	@touch $@

# Open MPI and MPICH both bring a program named mpirun, so MPICH gets a prefix of its own. It is optional.
$(VENV)/.mpich: | $(VENV)/.installed
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --ignore-installed --prefix $(VENV)/mpich mpich \
	    || echo "MPICH could not be installed: what needs it is skipped ('rm $@' and 'make setup' try again)"
	@touch $@

run: setup
	@mkdir -p build
	@$(IN_VENV) $(BIN)/python -m parallel train --layout dp2,tp2 --data stdlib --compare-steps 20 --generate 300 \
	    --plot build/training.png --report build/report.json $(TRAIN_ARGS)
	@echo
	@$(IN_VENV) $(BIN)/python -m parallel train --layout pp2,tp2 --schedule 1f1b --micro-batches 4 --steps 200 --warmup 50 --data stdlib \
	    --compare-steps 20 --timeline build/pipeline.png --report build/pipeline.json $(TRAIN_ARGS)

test: setup
	@$(IN_VENV) $(BIN)/python -m pytest $(TEST_ARGS)

# Peers that only the benchmarks need. Intel MPI comes when it can; torch, for Gloo, takes gigabytes and is asked for by BENCH_GLOO=1.
$(VENV)/.impi: | $(VENV)/.installed
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --ignore-installed --prefix $(VENV)/impi impi_rt \
	    || echo "Intel MPI could not be installed: it is left out of the benchmarks ('rm $@' and 'make bench' try again)"
	@touch $@

TORCH := $(BIN)/python -m pip install -qq --disable-pip-version-check --ignore-installed --prefix $(VENV)/gloo torch

$(VENV)/.gloo: | $(VENV)/.installed
	@echo "installing torch for Gloo (without CUDA where its index of CPU builds can be reached)"
	@$(TORCH) --retries 0 --index-url https://download.pytorch.org/whl/cpu 2>/dev/null || $(TORCH) \
	    || echo "torch could not be installed: Gloo is left out of the benchmarks ('rm $@' and 'make bench BENCH_GLOO=1' try again)"
	@touch $@

bench: setup $(VENV)/.impi $(if $(BENCH_GLOO),$(VENV)/.gloo)
	@$(BIN)/python -m bench $(BENCH_ARGS)
	@$(if $(BENCH_ARGS),,$(BIN)/python -m bench all_reduce all_gather broadcast --transports shm --ranks 3 --sizes 8K --odd)
	@$(if $(BENCH_ARGS),,$(BIN)/python -m bench all_reduce all_gather broadcast --transports shm --ranks 2 --sizes 64K,1M,16M --first-touch)
	@$(if $(BENCH_GLOO),$(if $(BENCH_ARGS),,$(BIN)/python -m bench train))

check: setup
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { $(BIN)/ruff format --check; exit 1; }
	@$(BIN)/mypy --strict
	@$(BIN)/clang-format --dry-run -Werror $(filter %.cpp %.hpp,$(NATIVE_SOURCES))

SANITIZERS := address,undefined thread
# The thread sanitizer cannot map its shadow where addresses are randomised over many bits.
FIXED_ADDRESSES := $(shell setarch `uname -m` -R true 2>/dev/null && echo "setarch `uname -m` -R")

sanitize: setup
	@set -e; for sanitizer in $(SANITIZERS); do \
	    build=build/sanitize-$${sanitizer%%,*}; \
	    $(IN_VENV) CXX="$(CXX)" $(BIN)/cmake -S . -B $$build -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	        -DCOLLECTIVES_PYTHON_MODULES=OFF -DCOLLECTIVES_SELF_TESTS=ON -DCOLLECTIVES_SANITIZE=$$sanitizer >/dev/null; \
	    $(IN_VENV) $(BIN)/cmake --build $$build -- --quiet; \
	    for program in $$build/self_tests/*; do \
	        echo "$$program under $$sanitizer"; \
	        UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 $(FIXED_ADDRESSES) $$program; \
	    done; \
	done

soak: setup
	@$(IN_VENV) $(BIN)/python -m pytest --hypothesis-profile=soak --timeout=3600 -m 'not mpi' tests/kernels tests/collectives $(SOAK_ARGS)
	@$(IN_VENV) $(BIN)/python -m pytest --hypothesis-profile=soak -m soak tests/transports

clean:
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(PACKAGES) bench tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
