# `make demo` and `make test` work in a fresh clone: both set up .venv first, and skip that when it is up to date.
# Options: PYTHON=python3.12 chooses the interpreter that .venv is made from; TESTS=tests/config the tests that run;
# JOBS=4 how many run side by side, a file each. A test takes up to 8 processes, so 2 jobs keep a few cores busy.
# TORCH=2.11.0 is installed by `make setup` instead of the version in constraints.txt.

PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
TESTS ?= tests
JOBS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

# DeepSpeed compiles its own kernels on installation when told to; nothing here needs them
export DS_BUILD_OPS ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-hosts test-all lint format docs site figures examples clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /:/' | awk -F: '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install the package and its pinned dependencies

# The stamp is the last step, so a broken installation is repeated. torch comes first: DeepSpeed's own build looks for it.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is older than 3.10; name a newer one: make setup PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install setuptools wheel
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt torch numpy
	$(BIN)/python -m pip install -c .venv/constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## prepare text, train a small model on two ranks, show what came out
	$(BIN)/megatron-stable demo

test: setup  ## the test suite, but for tests/hosts
	$(BIN)/python -m pytest $(TESTS) -n $(JOBS) --dist loadfile -m 'not full' --ignore tests/hosts

test-hosts: setup  ## every launcher on two machines in namespaces; needs root, sshd, pdsh, Open MPI, Slurm
	$(BIN)/python -m pytest tests/hosts -n $(JOBS) --dist loadfile

test-all: setup  ## the test suite with the full product of layouts and recipes, and other people's tools
	$(BIN)/python -m pip install -q -c .venv/constraints.txt -e '.[tools]'
	$(BIN)/python -m pytest $(TESTS) -n $(JOBS) --dist loadfile

lint: setup  ## ruff, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## write the pages that are generated from the code
	$(BIN)/python -m megatron_stable.config.reference docs/configuration.md
	$(BIN)/python -m megatron_stable.config.methods docs/methods
	$(BIN)/python -m megatron_stable.records.reference docs/ledger.md
	$(BIN)/python -m megatron_stable.records.probes_reference docs/probes.md
	$(BIN)/python -m megatron_stable.records.warnings_reference docs/warnings.md

site: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

figures: setup  ## train two small runs, and draw the figures of docs/diagnostics.md; minutes
	$(BIN)/python examples/diagnostics.py

examples: setup  ## write the examples' plans, and the table of examples/README.md
	$(BIN)/python examples/pages.py

clean:  ## remove .venv and the tools' caches
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
