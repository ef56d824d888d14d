# Every target works on a fresh machine: the first one that runs makes `.venv` from constraints.txt, once.
# `make test PYTHON=/path/to/python` uses an environment of your own instead and installs nothing.

ifneq ($(origin PYTHON), command line)
PYTHON := .venv/bin/python
READY := .venv/ready
endif

.PHONY: demo test test-all check style bench bench-conversion conformance deepspeed faults versions engines fuzz default-run ablation clean
.DEFAULT_GOAL := test

.venv/ready: constraints.txt pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,plot]'
	touch $@

demo: $(READY)
	$(PYTHON) -m internvl.demo

# One worker a core, but no more than eight: each takes some 3 GB. A file's tests stay together, since they share fixtures.
PYTEST := -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: $(READY)
	$(PYTHON) $(PYTEST)

test-all: $(READY)
	$(PYTHON) $(PYTEST) -m 'not released'

# mypy names a package after its folder, and a clone may be called anything: it reads the sources through a link.
check: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mkdir -p .mypy_cache/package && ln -sfn ../.. .mypy_cache/package/internvl
	cd .mypy_cache/package && $(abspath $(PYTHON)) -m mypy --config-file ../../pyproject.toml internvl

style: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# open_clip alone, of which one file is read: with it would come a torchvision that need not be of this torch's build.
ifdef READY
BENCH := .venv/bench
endif
.venv/bench: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps open_clip_torch
	touch $@

bench: $(BENCH) $(READY)
	$(PYTHON) -m benchmarks

# Needs 40 GB of disk and some minutes.
bench-conversion: $(READY)
	$(PYTHON) -m benchmarks.conversion

# transformers' own test mixins against every class of this package.
conformance: $(READY)
	$(PYTHON) tests/conformance/run.py

# DeepSpeed comes as source whose set-up imports torch, so it is built in the environment itself.
ifdef READY
DEEPSPEED := .venv/deepspeed
endif
.venv/deepspeed: .venv/ready
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ninja setuptools wheel
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation deepspeed
	touch $@

# The engines in full, ZeRO-3 too: it trains as one process does.
deepspeed: $(DEEPSPEED) $(READY)
	$(PYTHON) -m pytest -m slow tests/test_engines.py

# Processes that write are killed at random points, and nothing may be lost (tests/faults/).
faults: $(READY)
	$(PYTHON) tests/faults/run.py

# The same checkpoints give the same tokens on every supported transformers release (tests/versions/).
versions: $(READY)
	$(PYTHON) tests/versions/matrix.py

# Thousands of damaged images, messages, checkpoints and rows; SEED is that of the damage (tests/fuzz/).
SEED ?= 0
fuzz: $(READY)
	$(PYTHON) -m tests.fuzz --seed $(SEED)

# Real engines and harnesses, each in an environment of its own, answer as `generate` does (tests/engines/). `make engines
# ENGINES="vllm lm_eval"` runs some. Takes an hour on two cores, the first time, and 8 GB of disk.
engines: $(READY)
	$(PYTHON) tests/engines/run.py $(ENGINES)

# The root checkpoint from nothing, stage by stage; what was stopped goes on. glibc returns large blocks to the system after
# each use: keeping them makes a step a fifth faster.
RUN ?= runs_output/default
KEEP_MEMORY := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456
default-run: $(READY)
	$(KEEP_MEMORY) $(PYTHON) -m internvl.training.default_run --output $(RUN) --resume

ablation: $(READY)
	$(KEEP_MEMORY) $(PYTHON) -m internvl.training.ablation --output $(RUN)_ablation --resume

clean:
	rm -rf .venv .versions .conformance .engines .mypy_cache .pytest_cache .ruff_cache build *.egg-info
