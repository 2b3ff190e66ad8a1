# Every target prepares what it needs on first use. Settings, on the command line or exported:
#   PYTHON    the interpreter to start from; a torch it can import is used, never replaced
#   VENV      the environment's folder, or "none": PYTHON's own environment, to which hal alone is
#             added, in place; needs no network, for a GPU machine:  make test VENV=none
#   TORCH     installed only where there is no torch yet, TRITON likewise
#   PIP_ARGS  further arguments of every `pip install`, e.g. to choose an index
#   JOBS      parallel test workers
#   ARGS      passed on to the demo or to pytest:  make test ARGS="-k layout"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
PIP_ARGS ?=
JOBS ?= 2
ARGS ?=
export PYTHON TORCH TRITON PIP_ARGS

ifeq ($(VENV),none)
PY := $(PYTHON)
else
PY := $(abspath $(VENV))/bin/python
endif

SCRIPTS := .ci/test .ci/platforms # Python without the ending

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types platforms matrix matrix-torch golden wheel wheel-check clean
.PRECIOUS: $(VENV)/.ready-%

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1:/p' $(MAKEFILE_LIST) | awk -F: '{printf "  make %-12s %s\n", $$1, $$2}'

extras-demo := demo
extras-test := demo,test
extras-dev := dev
$(VENV)/.ready-%: pyproject.toml .ci/setup
	@.ci/setup $(VENV) $(extras-$*)
	@test $(VENV) = none || touch $@

demo: $(VENV)/.ready-demo ## quantize a small MoE model on this machine and chart quality against bytes
	@$(PY) examples/demo.py $(ARGS)

test: $(VENV)/.ready-test ## run all tests
	@$(PY) .ci/test --jobs $(JOBS) $(ARGS)

lint: $(VENV)/.ready-dev ## check style
	@$(PY) -m ruff check . $(SCRIPTS); \
	rules=$$?; $(PY) -m ruff format --check . $(SCRIPTS) && exit $$rules

format: $(VENV)/.ready-dev ## mend style
	@$(PY) -m ruff check --fix . $(SCRIPTS)
	@$(PY) -m ruff format . $(SCRIPTS)

types: $(VENV)/.ready-dev ## check types, with mypy and pyright
	@.ci/types $(PY)

platforms: $(VENV)/.ready-test ## ask hal about every device of its tables
	@$(PY) .ci/platforms $(ARGS)

matrix: $(VENV)/.ready-test ## compile and interpret all kernels; write evidence and pages (slow)
	@$(PY) benchmarks/compile_matrix.py --jobs $(JOBS)
	@$(PY) benchmarks/torch_archs.py
	@$(PY) -m pytest -q -n $(JOBS) -m matrix tests/kernels
	@$(PY) -m hal verify --interpreter --output build/interpreted.jsonl
	@$(PY) -m hal verify --on cpu --output build/ran.jsonl
	@$(PY) -m hal verify --merge build/interpreted.jsonl build/ran.jsonl
	@$(PY) benchmarks/linear_matrix.py
	@$(PY) benchmarks/readme_matrix.py
	@$(PY) benchmarks/quality.py
	@$(PY) -m hal matrix --html --output build/matrix.html

matrix-torch: $(VENV)/.ready-test ## the CPU tests under four releases of torch; pulls gigabytes (very slow)
	@$(PY) benchmarks/torch_matrix.py --jobs $(JOBS) $(ARGS)

golden: $(VENV)/.ready-test ## write the golden tables of selection, and the pages made of it
	@$(PY) benchmarks/golden_selection.py
	@$(PY) benchmarks/linear_matrix.py
	@$(PY) benchmarks/readme_matrix.py
	@$(PY) benchmarks/quality.py

wheel: $(VENV)/.ready-test ## build dist/*.whl
	@rm -rf build/lib
	@$(PY) -m pip wheel -qq --disable-pip-version-check --no-deps --no-build-isolation -w dist .

wheel-check: $(VENV)/.ready-test ## install the wheel in a fresh environment and use it there
	@.ci/wheel-check $(PY)

clean: ## remove the environment and all that was built
	rm -rf .venv build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find hal platforms quant ops tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
