# make demo: the whole chain on built-in photographs. make test: the tests. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-gpu check bench env clean-demo

env: $(VENV)/.ready

# the stamp is younger than what it was made from, so a second run does nothing
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: python3-venv is missing (apt-get install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@touch $@

demo: env
	@$(BIN)/python tools/demo.py

# on the CPU also where there is a GPU: figures and tolerances of these tests are the CPU's; two files
# at once, each on a core of its own: threads of both on the same cores wait for each other
test: env
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m 'not slow and not gpu'

# Slurm's nodes, and the ranks of the longest file, have the machine for themselves
ALONE := tests/slurm tests/engine/test_matrix.py

test-slow: env
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		-m 'slow and not gpu' $(ALONE:%=--ignore %)
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m 'slow and not gpu' $(ALONE)

test-gpu: env
	@$(BIN)/python -m pytest -m gpu tests/gpu

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck -x slurm/*.sh tests/slurm/*.sh .ci/run; \
	else echo "error: shellcheck is missing (apt-get install shellcheck)" >&2; exit 2; fi

bench: env
	$(BIN)/python tools/benchmark.py all

clean-demo:
	rm -rf outputs/demo
