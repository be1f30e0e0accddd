# make demo [CLASSES="fluent3d/animal-mammal 12"] [STEPS=10]   sample the checkpoint: demo.png and demo_stages.png
# make test [PYTEST_ARGS="tests/ops -k scan"]   run the tests in two processes, or selected ones in one
# make test-slow   run those that take long and change rarely: benchmarks, whole ablations, kernels compiled for a GPU
# make test-inception   compare with torch-fidelity's Inception v3 (downloads gigabytes)
# make mutants [MUTANTS="diffusers_pisdm/ops/scan_paths.py"]   list the edits that no test notices
# make fuzz [FUZZ="--mutations 20000 --seed 1"]   damage files and read them: documented errors, no hang
# make lint   check style with ruff
# make docs   build the documentation in site/
# make clean  remove everything these commands made
#
# Each target first creates .venv with what it needs, at the versions in constraints.txt, and can be interrupted and
# repeated at any point: a step's stamp file in .venv is written only when the step is complete.
# To use another interpreter: make demo PYTHON=python3.12
# torch-fidelity needs torchvision, whose packages fit only one build of PyTorch, on PyPI the one for CUDA. So its
# tests have their own environment, .venv-inception, with PyTorch and torchvision from the same index.

PYTHON ?= python3
PYTEST_ARGS ?=
MUTANTS ?=
FUZZ ?=
# Denoising steps: one number, or one per stage; empty: the checkpoint's default.
STEPS ?=
# The recipe reads these from its environment, so that no shell ever interprets a class name.
CLASSES ?=
export CLASSES

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# Compiling every module would take as long as all the rest; Python compiles those that are imported, and must keep
# what it compiled: each of the tests' many processes would otherwise spend seconds on it.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check --no-input --no-compile -c constraints.txt
# A file's tests stay in one process, as they share trained models.
TWO_PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder
INCEPTION_VENV := .venv-inception
INCEPTION_PYTHON := $(INCEPTION_VENV)/bin/python
DEMO_ARGS = --model checkpoints/pisdm-emoji128 $(if $(STEPS),--num_inference_steps $(STEPS)) --output demo.png \
  --stages_output demo_stages.png

# Left by an earlier `pip install .`: compiled kernels in a folder that would hide the clone's package.
REMOVE_OLD_COPY = rm -rf $(VENV)/lib/python*/site-packages/diffusers_pisdm

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-inception mutants fuzz lint docs clean
# All steps install into one environment, which two pips at once would break, so even `make -j` runs them one by one.
.NOTPARALLEL:

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed
	@$(VENV_PYTHON) examples/generate.py $(DEMO_ARGS) $${CLASSES:+--classes "$$CLASSES"}

test: $(VENV)/.installed-dev
	@$(VENV_PYTHON) -m pytest $(or $(PYTEST_ARGS),$(TWO_PROCESSES))

test-slow: $(VENV)/.installed-dev
	@$(VENV_PYTHON) -m pytest $(TWO_PROCESSES) -m slow

test-inception: $(INCEPTION_VENV)/.installed
	@$(INCEPTION_PYTHON) -m pytest tests/evaluation/networks/test_inception_v3.py $(PYTEST_ARGS)

mutants: $(VENV)/.installed-mutants
	@$(VENV_PYTHON) -m tests.mutants $(MUTANTS)

fuzz: $(VENV)/.installed-dev
	@$(VENV_PYTHON) -m tests.fuzz $(FUZZ)

lint: $(VENV)/.installed-dev
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --quiet --strict
	@echo "The documentation is in site/index.html"

clean:
	rm -rf $(VENV) $(INCEPTION_VENV) site build dist demo.png demo_stages.png *.egg-info .pytest_cache .ruff_cache

# The environment. The stamp holds the clone's path: an environment that moved with its clone is set up again (its
# editable install points to the old place), as is one whose interpreter is gone.
ifneq ($(shell $(VENV_PYTHON) -c 'print(open("$(VENV)/.created").read())' 2>/dev/null),$(CURDIR))
.PHONY: $(VENV)/.created
endif

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "error: Python 3.10 or later is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Install a newer one and name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || { \
	  echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV); } || { \
	  echo "error: $(PYTHON) could not create $(VENV); on Debian and Ubuntu, install python3-venv." >&2; exit 1; }
	@printf '%s' "$(CURDIR)" > $@.unfinished && mv $@.unfinished $@

# PyTorch first and alone: it is the largest download, and only the pin in constraints.txt determines its version.
$(VENV)/.installed: $(VENV)/.created constraints.txt setup.py
	@for info in $(VENV)/lib/python*/site-packages/*.dist-info; do \
	  test -e "$$info/RECORD" || rm -rf "$$info"; done # interrupted halfway: pip would consider such a package complete
	@echo "Installing PyTorch (the longest step of the first run)"
	@$(PIP_INSTALL) torch
	@echo "Installing diffusers_pisdm and what it needs"
	@$(PIP_INSTALL) --quiet --editable .
	@$(REMOVE_OLD_COPY)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "Installing what developers need"
	@$(PIP_INSTALL) --quiet --editable ".[$*]"
	@$(REMOVE_OLD_COPY)
	@touch $@

# No constraints: torchvision determines the PyTorch version. The environment tells git to ignore it.
$(INCEPTION_VENV)/.installed: setup.py
	@$(INCEPTION_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(INCEPTION_VENV)
	@printf '*\n' > $(INCEPTION_VENV)/.gitignore
	@echo "Installing PyTorch and torchvision (gigabytes, where the index has CUDA builds)"
	@$(INCEPTION_PYTHON) -m pip install --disable-pip-version-check --no-input torch torchvision
	@echo "Installing what 'make test-inception' needs"
	@$(INCEPTION_PYTHON) -m pip install --disable-pip-version-check --no-input --quiet --editable ".[inception]" \
	  pytest pytest-timeout
	@touch $@
