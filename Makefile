# What a contributor runs and what CI runs are the same targets. `make help` lists them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# GPU builds of torch are gigabytes: where no CPU build is at hand, name the index that has one, e.g.
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help install test check format demo test-slow fuzz doors versions benchmarks gpu peers reproduce figures site clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## install into .venv, when pyproject.toml or constraints.txt changed

# A process a core, each with one thread: threads of several processes that share cores wait for one another.
test: check  ## everything that CI runs: the checks and the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow"

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

doors: $(INSTALLED)  ## every combination with trainers, adapters and optimizers, into docs/composability.md
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -r doors/requirements.txt
	$(if $(HERE),$(RUN) $(SHARED)/tools/fetch_models.py .cache/models minilm e5-small)
	$(RUN) -m doors
	test -d $(DEEPSPEED) || $(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --no-build-isolation \
		--target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	PYTHONPATH=$(DEEPSPEED) $(RUN) -m doors --only deepspeed.
	PYTHONPATH=$(DEEPSPEED) $(RUN) -m pytest -q tests/integration/test_examples.py -k zero3

# VERSIONS_FLAGS="--only transformers-5.3 --suite Trainer" for some of it.
VERSIONS_FLAGS ?=
versions: $(INSTALLED)  ## the core suites with other versions of Python, torch and transformers, into docs/versions.md
	$(RUN) -m versions $(VERSIONS_FLAGS)

# In a folder of its own, since accelerate and transformers import it wherever they find it; its setup imports torch.
DEEPSPEED := .cache/deepspeed

FUZZ_SECONDS ?= 600
fuzz: $(INSTALLED)  ## 300 bad invocations of the command, and ten minutes of fuzzing the readers (FUZZ_SECONDS=…)
	HF_HUB_OFFLINE=1 PYTHONPATH=tests/support $(RUN) tests/fuzz/fuzz_commands.py
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt atheris
	$(RUN) tests/fuzz/fuzz_readers.py --seconds $(FUZZ_SECONDS)

# BENCHMARK_FLAGS="--size small" to see that they work; --device cuda for the GPU's columns.
BENCHMARK_FLAGS ?=
benchmarks: $(INSTALLED)  ## every benchmark in turn, within half an hour, and docs/performance.md from what they found
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev,benchmarks]'
	$(RUN) -m benchmarks all $(BENCHMARK_FLAGS)
	$(if $(findstring small,$(BENCHMARK_FLAGS)),,$(RUN) -m benchmarks report)

# With whatever Python has torch for the GPU: nothing is installed. GPU_FLAGS="--device cpu --tiny" to see that it works.
GPU_PYTHON ?= $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))
GPU_FLAGS ?=
gpu:  ## everything that waits for a GPU, within 25 minutes, into benchmarks/results/gpu
	$(GPU_PYTHON) -m benchmarks gpu $(GPU_FLAGS)

# Never a part of the project: a checkout, an environment of its own (transformers < 5), and a folder for one process alone.
PEERS := .cache/peers
TRIMMERS := .cache/trimming-peers
# trimbed is for 3.12 and 3.13 alone.
TRIMBED_PYTHON ?= python3.13
peers: $(INSTALLED)  ## fetch what the benchmarks stand beside: the authors' code, five packages
	test -d $(PEERS)/authors || git clone --quiet --depth 1 https://github.com/mlsw/partial-embedding-matrix-adaptation $(PEERS)/authors
	test -d $(PEERS)/torchao || $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --target $(PEERS)/torchao torchao
	test -d $(PEERS)/smaller-vocab || $(PYTHON) -m venv $(PEERS)/smaller-vocab
	$(PEERS)/smaller-vocab/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
		'transformers<5' transformer-smaller-training-vocab sentencepiece
	test -d $(TRIMMERS)/prunetokens || $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(TRIMMERS)/prunetokens prunetokens==0.1.4
	test -d $(TRIMMERS)/vocabtrimmer || $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(TRIMMERS)/vocabtrimmer vocabtrimmer==0.0.2 transformers==4.57.3 huggingface_hub==0.36.0 tokenizers==0.22.1 \
		datasets==3.6.0 requests certifi charset_normalizer httpx httpcore h11 anyio sniffio idna
	test -d $(TRIMMERS)/trimbed || $(TRIMBED_PYTHON) -m venv $(TRIMMERS)/trimbed
	$(TRIMMERS)/trimbed/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) 'trimbed[model,convert]==0.0.4'

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

figures: $(INSTALLED)  ## what is drawn from the code: the figure in the README, the wings in CONTRIBUTING.md, tables, the calculator
	$(RUN) docs/figures/make_memory_figure.py
	$(RUN) -m docs.figures.draw_wings
	$(RUN) -m docs.figures.draw_encoders
	$(RUN) -m docs.figures.draw_models
	$(RUN) -m docs.figures.make_calculator
	$(RUN) -m docs.figures.draw_trimming

site: $(INSTALLED)  ## the pages as a site, into .cache/site/site; without network, and every link is followed
	$(RUN) -m website

clean:  ## remove what the targets made, .venv included
	rm -rf $(VENV) build dist demo-output .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"leanvocab needs Python 3.11 or later; $(PYTHON) is {v.major}.{v.minor}. Name a newer one: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
