# One way to run things. Every target makes its own .venv from the pinned constraints, then runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# A process of pytest for each core, eight at most: each takes a gigabyte. `make test PROCESSES=2` takes fewer.
PROCESSES ?= logical
PARALLEL := --numprocesses $(PROCESSES) --maxprocesses 8

.PHONY: demo test test-all lint bench clean

demo: $(INSTALLED)
	$(BIN)/mogeo demo --output runs/demo

# What is not marked slow, and a tenth of the examples of each property: four minutes on two cores.
test: $(INSTALLED)
	$(BIN)/pytest $(PARALLEL) --dist worksteal -m "not slow" --hypothesis-profile quick

# Every test, and two in ten of the examples of each property, as CI runs it. One process runs all tests of a file, so
# that slow fixtures which they share are made once. Files keep their order, in which the slowest, tests/benchmarks, come
# first: xdist would run those of the fewest tests last.
test-all: $(INSTALLED)
	$(BIN)/pytest $(PARALLEL) --dist loadfile --no-loadscope-reorder --hypothesis-profile ci

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	mkdir -p runs/bench
	$(BIN)/python benchmarks/solver.py --json runs/bench/solver.json
	$(BIN)/python benchmarks/kernels.py --json runs/bench/kernels.json --plot runs/bench/roofline.png
	$(BIN)/python benchmarks/step_overhead.py --json runs/bench/step-cpu.json
	$(BIN)/python benchmarks/step_overhead.py --model small-tensors --json runs/bench/small-tensors.json
	$(BIN)/python benchmarks/communication.py --json runs/bench/communication.json
	$(BIN)/python benchmarks/memory_modes.py --json runs/bench/memory-modes.json --plot runs/bench/memory-modes.png
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		set -x; $(BIN)/python benchmarks/step_overhead.py --device cuda --json runs/bench/step-gpu.json; \
		$(BIN)/python benchmarks/memory_modes.py --device cuda --parts time memory --json runs/bench/modes-gpu.json; \
	else \
		echo "left out: step_overhead.py and memory_modes.py --device cuda, the kernels and their bandwidth: no GPU"; \
	fi

# torch goes first and by its exact version, so that no other package's looser requirement picks another build.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
