# make demo     set everything up, pre-train a small InternImage on two ranks, show what it learned
# make transfer-demo   train three other tasks from what the demo has learned
# make test     set everything up and run the tests
# make docs     build the documentation as a site in build/site; a broken link fails
.PHONY: setup lock demo transfer-demo h-on-cpu test test-fast test-gpu gpu-session-rehearsal bench lint docs clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, file by file, the longest files first. Three for two cores: tests of
# clusters and of stalls mostly wait.
TEST_WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# One thread per process where two processes share two cores.
ONE_THREAD := OMP_NUM_THREADS=1
DEMO_OVERRIDES ?=

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py pyproject.toml requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.10, 3.11 or 3.12 is needed: make setup PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements/lock.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

# Renews the lock file within requirements/constraints.txt; afterwards: make clean test.
lock: setup
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --upgrade --extra dev pyproject.toml \
	  --constraint requirements/constraints.txt --no-emit-index-url \
	  --custom-compile-command "make lock" --output-file requirements/lock.txt

# m3i glyphs, m3i tokenizer, deepspeed --module m3i_scale.train --config m3i:demo, m3i eval
demo: setup
	$(BIN)/m3i demo $(DEMO_OVERRIDES)

# What the demo's backbone is worth in classification, detection and segmentation.
transfer-demo: setup
	$(BIN)/m3i transfer-demo $(DEMO_OVERRIDES)

# The real InternImage-H without a GPU: 20 GiB of memory, 12 GB of disk; see docs/plan.md.
h-on-cpu: setup
	$(BIN)/m3i glyphs --out data_demo/glyphs
	$(BIN)/m3i tokenizer data_demo/glyphs/text.parquet --vocab-size 1000 --out data_demo/tokenizer.json
	DS_ACCELERATOR=cpu $(BIN)/python benchmarks/h_on_cpu.py

test: setup
	$(ONE_THREAD) $(PYTEST)

# For the loop of work: no Slurm, no groups of processes, nothing that takes long.
test-fast: setup
	$(ONE_THREAD) $(PYTEST) -m "not distributed and not slurm and not slow"

test-gpu: setup
	$(BIN)/python -m pytest tests/kernels -n 4 -m "not cpu_only"

# The GPU session in a small form on a CPU. In an environment with nothing but what the session
# lists: make gpu-session-rehearsal SESSION_PYTHON=/path/to/python WHEELS=.whl
SESSION_PYTHON ?=
WHEELS ?=
gpu-session-rehearsal: $(if $(SESSION_PYTHON),,setup)
	bash benchmarks/gpu_session/run.sh runs/gpu-session --rehearse \
	  $(if $(WHEELS),--wheels $(WHEELS)) --python $(or $(SESSION_PYTHON),$(abspath $(BIN)/python))

bench: setup
	$(BIN)/python kernels/bench/run.py --static

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mkdocs is not in the lock file: nothing but this target needs it. (--quiet would hide from --strict
# the warnings that it counts.)
docs: setup
	$(BIN)/python -m pip install --quiet --constraint requirements/lock.txt --editable '.[docs]'
	$(BIN)/python docs/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build data_demo runs/demo
