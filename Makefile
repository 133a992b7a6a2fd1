# fedsplit's few commands. Each makes its own virtual environment first; nothing outside .venv is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.installed
# A package index to look in too, e.g. that of PyTorch's builds without CUDA (README.md, Requirements); empty: none.
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# One worker more than cores, for tests of whole runs mostly wait; never more than four, for each starts Flower processes.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, 1 + (os.cpu_count() or 1)))")
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

.PHONY: help setup demo demo-pages test test-fast test-lowest test-newest check format bench sizes proto clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with everything in it, at the pinned versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)   ## four simulated sites on scanned digits, no download: a few minutes
	$(BIN)/fedsplit demo

demo-pages: $(STAMP) ## run the demo and put its tables and pictures into README and the first tutorial
	$(BIN)/python scripts/demo_pages.py

test: $(STAMP)   ## all tests, the slow ones too
	$(BIN)/python $(PYTEST)

test-fast: $(STAMP) ## the tests that take seconds
	$(BIN)/python $(PYTEST) -m "not slow"

test-lowest: $(STAMP) ## the fast tests with the lowest versions that pyproject.toml allows, torch excepted
	$(PYTHON) -m venv .venv-lowest
	echo "$(TORCH)" > .venv-lowest/torch.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --resolution lowest-direct --override .venv-lowest/torch.txt -o .venv-lowest/lowest.txt
	.venv-lowest/bin/python $(PIP_INSTALL) -c .venv-lowest/lowest.txt -e '.[dev]'
	.venv-lowest/bin/python $(PYTEST) -m "not slow"

test-newest:     ## the fast tests with the newest versions that pyproject.toml allows, torch excepted
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager $(TORCH) -e '.[dev]'
	.venv-newest/bin/python $(PYTEST) -m "not slow"

check: $(STAMP)  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## ratios of interleaved runs, to benchmarks/results/
	$(BIN)/python -m benchmarks

sizes: $(STAMP)  ## measure installs and idle memory, into docs/reference/sizes.md: some minutes
	$(BIN)/python scripts/sizes.py $(if $(TORCH_INDEX),--index $(TORCH_INDEX))

proto: $(STAMP)  ## generate the gRPC messages anew (a test compares them)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. fedsplit/transport/encoder.proto

clean:           ## remove .venv and caches
	rm -rf $(VENV) .venv-lowest .venv-newest .pytest_cache .mypy_cache .ruff_cache .hypothesis
