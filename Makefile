# What a contributor runs and what CI runs are the same targets. `make help` lists them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BENCHMARKS := $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[!_]*.py))
# GPU builds of torch are gigabytes: where no CPU build is at hand, name the index that has one, e.g.
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test check format demo test-slow fuzz benchmarks reproduce figures clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## install into .venv, when pyproject.toml or constraints.txt changed

test: check  ## everything that CI runs: the checks and the tests
	$(RUN) -m pytest -m "not slow"

check: $(INSTALLED)  ## format, lint, types, import layers
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: $(INSTALLED)  ## format, and mend what the linter can
	$(RUN) -m ruff format
	$(RUN) -m ruff check --fix

demo: $(INSTALLED)  ## fine-tune a real model twice, with the full and a partial vocabulary, and compare
	$(RUN) -m demo

test-slow: $(INSTALLED)  ## the tests that take longer than CI allows
	$(RUN) -m pytest -m slow --timeout 3600

FUZZ_SECONDS ?= 600
fuzz: $(INSTALLED)  ## ten minutes of fuzzing the readers of what lies on disk (FUZZ_SECONDS=…)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(RUN) tests/fuzz/fuzz_readers.py --seconds $(FUZZ_SECONDS)

benchmarks: $(INSTALLED)  ## every benchmark in turn; each prints its figures
	@set -e; for name in $(BENCHMARKS); do echo "== python -m benchmarks.$$name"; $(RUN) -m benchmarks.$$name; done

# Real data beside the project, where there are any, at sizes that two cores manage. Otherwise everything comes from the
# hub and is run whole, as in the paper, which takes a GPU.
SHARED ?= $(or $(LEANVOCAB_SHARED),../shared)
HERE := $(wildcard $(SHARED)/data)
REPRODUCE_FLAGS ?= $(if $(HERE),--data $(SHARED)/data --tokenizers $(SHARED)/data/tokenizers --models .cache/models \
	--packages --max-megabytes 100 --max-steps 8 --epochs 1 --max-train-samples 128 --max-eval-samples 128 \
	--training-task wnli --training-task mrpc --training-task cola)
reproduce: $(INSTALLED)  ## the paper's tables and figure, cell by cell, into reproduction/REPORT.md
	$(if $(HERE),$(RUN) $(SHARED)/tools/fetch_models.py .cache/models minilm e5-small)
	$(RUN) -m reproduction all $(REPRODUCE_FLAGS)

figures: $(INSTALLED)  ## the figure in the README
	$(RUN) docs/figures/make_memory_figure.py

clean:  ## remove what the targets made, .venv included
	rm -rf $(VENV) build dist demo-output .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"leanvocab needs Python 3.11 or later; $(PYTHON) is {v.major}.{v.minor}. Name a newer one: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
