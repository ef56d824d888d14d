# Every target works on a fresh machine: the first one that runs makes `.venv` from constraints.txt, once.
# `make test PYTHON=/path/to/python` uses an environment of your own instead and installs nothing. `make help` lists the targets.

ifneq ($(origin PYTHON), command line)
PYTHON := .venv/bin/python
READY := .venv/ready
endif

.PHONY: help demo test test-all check style bench bench-conversion bench-real-sizes conformance deepspeed faults versions engines serving fuzz default-run ablation funnel-ablation clean
.DEFAULT_GOAL := test

# clip-benchmark alone, of which JSON files are read: with it would come libraries that nothing here needs.
.venv/ready: constraints.txt pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plot]'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps clip-benchmark
	touch $@

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile | awk -F '|' '{ printf "%-18s %s\n", $$1, $$2 }'

demo: $(READY) ## the bundled checkpoint answers questions about the bundled images
	$(PYTHON) -m internvl.demo

# One worker a core, but no more than eight: each takes some 3 GB. A file's tests stay together, since they share fixtures;
# in order of their names, since files of few tests are not the quick ones and would all come last.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(READY) ## the CPU test suite (default)
	$(PYTHON) $(PYTEST)

test-all: $(READY) ## with the slow tests, and those of a GPU where there is one
	$(PYTHON) $(PYTEST) -m 'not released'

# mypy names a package after its folder, and a clone may be called anything: it reads the sources through a link.
check: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mkdir -p .mypy_cache/package && ln -sfn ../.. .mypy_cache/package/internvl
	cd .mypy_cache/package && $(abspath $(PYTHON)) -m mypy --config-file ../../pyproject.toml internvl

style: $(READY) ## formats the sources
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# open_clip alone, of which one file is read: with it would come a torchvision that need not be of this torch's build.
ifdef READY
BENCH := .venv/bench
endif
.venv/bench: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps open_clip_torch
	touch $@

bench: $(BENCH) $(READY) ## speed and memory, one table (benchmarks/README.md)
	$(PYTHON) -m internvl.benchmarks

bench-conversion: $(READY) ## conversion of InternViT-6B's size: 40 GB of disk, some minutes
	$(PYTHON) -m internvl.benchmarks.conversion

bench-real-sizes: $(READY) ## models of 6 to 19 billion parameters: 40 GB of disk, 24 GB of memory
	$(PYTHON) -m internvl.benchmarks.real_sizes

conformance: $(READY) ## transformers' own tests against every class of this package
	$(PYTHON) tests/conformance/run.py

# DeepSpeed comes as source whose set-up imports torch, so it is built in the environment itself.
ifdef READY
DEEPSPEED := .venv/deepspeed
endif
.venv/deepspeed: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ninja setuptools wheel
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	touch $@

# ZeRO-3 too: it trains as one process does.
deepspeed: $(DEEPSPEED) $(READY) ## installs DeepSpeed and tests training on many processes in full
	$(PYTHON) -m pytest -m slow tests/test_engines.py

faults: $(READY) ## kills conversion, saving, training and the data funnel at random points (tests/faults)
	$(PYTHON) tests/faults/run.py

versions: $(READY) ## the same tokens on every supported transformers release (tests/versions)
	$(PYTHON) tests/versions/matrix.py

SEED ?= 0
fuzz: $(READY) ## damaged images, messages, checkpoints and rows; SEED=N for other damage (tests/fuzz)
	$(PYTHON) -m tests.fuzz --seed $(SEED)

# Each in an environment of its own. Takes an hour on two cores, the first time, and 11 GB of disk.
engines: $(READY) ## vLLM and others answer as `generate` does; ENGINES="vllm lm_eval" for some (tests/engines)
	$(PYTHON) tests/engines/run.py $(ENGINES)

# The chat servers among them; docs/serving.md says what was found.
serving: $(READY) ## vLLM and `transformers serve` answer chat requests as `generate` does (docs/serving.md)
	$(PYTHON) tests/engines/run.py --output benchmarks/results/serving.json $(CHAT_SERVERS)
CHAT_SERVERS ?= vllm_serve vllm_serve_eager vllm_tensor_parallel vllm_lora vllm_native transformers_serve guide

# Gradio asks for pillow<13, whose readers of images have known holes, and runs with the pinned one as well: so it comes
# first, and Pillow after it, in an environment where nothing else can take offence.
GRADIO := gradio==6.31.0
.PHONY: app test-app
APP := .app/bin/python
.app/ready: constraints.txt pyproject.toml
	python3 -m venv .app
	$(APP) -m pip install --quiet --disable-pip-version-check $(GRADIO)
	$(APP) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[evaluate,search]'
	touch $@

app: .app/ready ## a page: chat, classification, search, captions; PAGE="--model DIR --images DIR" for yours
	$(APP) -m internvl.serving page $(if $(PAGE),$(PAGE),--images examples)

.app/tested: .app/ready
	$(APP) -m pip install --quiet --disable-pip-version-check -c constraints.txt pytest pytest-timeout playwright requests
	touch $@

test-app: .app/tested ## the page in headless Chromium, and its guide
	$(APP) -m pytest --noconftest tests/test_app_page.py
	$(APP) -m pytest 'tests/test_serving_guide.py::test_the_guide_is_right[A page]'

# The root checkpoint from nothing, stage by stage; what was stopped goes on. glibc returns large blocks to the system after
# each use: keeping them makes a step a fifth faster.
RUN ?= runs_output/default
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
default-run: $(READY) ## trains the bundled checkpoint from nothing
	$(KEEP_MEMORY) $(PYTHON) -m internvl.reproduction run --output $(RUN) --resume

ablation: $(READY) ## trains it without one stage or another, at a tenth of the steps
	$(KEEP_MEMORY) $(PYTHON) -m internvl.reproduction ablation --output $(RUN)_ablation --resume

funnel-ablation: $(READY) ## trains stage 1 on polluted pairs, and on what the data funnel keeps of them
	$(KEEP_MEMORY) $(PYTHON) -m internvl.reproduction funnel --output $(RUN)_funnel --resume

clean: ## removes environments and caches
	rm -rf .venv .app .versions .conformance .engines .mypy_cache .pytest_cache .ruff_cache build *.egg-info
