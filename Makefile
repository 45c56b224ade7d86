# The two commands of the README (`make reproduce`, `make lab`) and their helpers.
# A target with a comment after `##` is listed by `make help`.
# Every target makes the environment it needs, once, and uses it again the next time.

VENV ?= .venv
EXTRA ?= dev
JOBS ?= 2
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.robustint-ready
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup reproduce lab test test-full bench export hooks clean

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=/path/to/python3.11]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

reproduce: $(READY) ## the main job: train, attack and measure on the embedded digits; a report under figures/quick
	@$(BIN)/robustint reproduce quick $(ARGS)

lab: $(READY) ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=. nbs/index.ipynb $(ARGS)

setup: $(READY) ## make the environment (.venv) and install the project into it

test: $(READY) ## run every notebook and the tests, on JOBS=2 processes
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not full" $(ARGS)

test-full: $(READY) ## run the long tests: kills, fuzzing, whole data sets, released networks
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m full $(ARGS)

bench: $(READY) ## measure speed beside other implementations, in an environment of its own (.venv-peers); figures/benchmarks.md
	@$(MAKE) --no-print-directory setup VENV=.venv-peers EXTRA=peers
	@for script in attacks maps ranks training scaling; do echo; echo "benchmarks/$$script.py"; \
	    .venv-peers/bin/python benchmarks/$$script.py --scale short $(ARGS) || exit 1; done
	@$(BIN)/python benchmarks/plan.py
	@.venv-peers/bin/python benchmarks/report.py --scale short $(ARGS)

export: $(READY) ## write the package and the README from the notebooks, and clean the notebooks
	$(BIN)/jupyter nbconvert --log-level=WARN --clear-output --inplace nbs/experiments/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level=WARN --to markdown nbs/index.ipynb --output-dir . --output README

hooks: $(READY) ## install the git hooks that keep notebooks clean
	git config --local core.hooksPath .githooks
	git config --local merge.nbdev-merge.name "merge notebooks cell by cell"
	git config --local merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"

clean: ## remove caches and build leftovers; records, figures and networks stay
	rm -rf build dist *.egg-info .pytest_cache .snakemake
	find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# The environment. The file READY says that the install went through; it is made anew when a requirement changes.
$(READY): settings.ini setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "robustint needs Python 3.11 or newer, and none was found:" \
	    "install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
	    "robustint needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1):" \
	    "name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make an environment (no ensurepip):" \
	    "install the package python3-venv (Debian, Ubuntu: apt install python3-venv) and run make again" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): once, about 2 minutes and 6 GB."
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --editable ".[$(EXTRA)]"
	@touch $@
