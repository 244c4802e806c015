# make demo: the whole chain on built-in photographs; make demo-gpu [IMAGES=DIR]: larger, on a GPU.
# make test: the tests. All set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# what .venv has, and the versions of all of it that the tests run with, on this minor version of Python
EXTRAS := demo dev
INTERPRETER = $(firstword $(wildcard $(BIN)/python) $(PYTHON))
LOCK = locks/python$(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

empty :=
comma := ,
list = $(subst $(empty) $(empty),$(comma),$(1))

.PHONY: demo demo-gpu test test-slow test-gpu check bench env lock clean-demo

env: $(VENV)/.ready

# the stamp is younger than what it was made from, so a second run does nothing
$(VENV)/.ready: pyproject.toml $(wildcard locks/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or newer is needed; set PYTHON=..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: python3-venv is missing (apt-get install python3-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$(addprefix --constraint ,$(wildcard $(LOCK))) --editable '.[$(call list,$(EXTRAS))]'
	@touch $@

# Adds to the lock what pyproject.toml has come to ask for; make lock UPGRADE=--upgrade renews all of
# it. What is for one build of torch alone does not belong there: the build's name, and the packages
# of those for GPUs, but for triton, of which torch's tests on the CPU take the version too.
HELD := triton==3.7.1  # as torch 2.13.0 for GPUs asks for; its build for CPUs does not tell
lock:
	@test -x build/lock/bin/pip-compile || { $(INTERPRETER) -m venv build/lock && \
		build/lock/bin/python -m pip install --quiet --disable-pip-version-check 'pip-tools>=7.5,<8'; }
	CUSTOM_COMPILE_COMMAND='make lock' build/lock/bin/pip-compile --quiet pyproject.toml \
		$(EXTRAS:%=--extra %) --output-file $(LOCK) --annotation-style line --strip-extras \
		--allow-unsafe --no-emit-options --upgrade-package $(HELD) $(UPGRADE)
	@sed -i -E '/^(cuda|nvidia)-/d; s/^([^+ ]+)\+[^ ]+/\1/' $(LOCK)

demo: env
	@$(BIN)/python tools/demo.py

demo-gpu: env
	@$(BIN)/python tools/demo.py --gpu $(if $(IMAGES),--images "$(IMAGES)")

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
	rm -rf outputs/demo outputs/demo-gpu
