# `make demo` and `make test` need nothing but Python 3.11 to 3.13 and make: they set up .venv by themselves.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras

# glibc gives large blocks back to the system at once and faults them in again at the next step, which costs a third
# of a training step's time on a CPU. Keeping them also keeps step times even.
export MALLOC_MMAP_THRESHOLD_ ?= 8589934592
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export VENV

# A process a core, each on one thread: small models compute no faster on several.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo install test test-all check format lint types constraints clean

help:  ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	@bash scripts/install.sh
	@touch $@

# apart from the rest: 320 MB for lm-evaluation-harness, 250 MB for Ray, and every start of transformers takes seconds
# longer where scikit-learn is installed
$(EXTRAS): $(STAMP)
	@echo "Installing lm-evaluation-harness and Ray ..."
	@$(BIN)/pip install -qq --constraint constraints.txt --editable ".[dev,harness,ray]"
	@touch $@

install: $(STAMP)  ## Create .venv and install metier into it.

demo: $(STAMP)  ## Run the main job on the embedded model: profile, select, train, evaluate, report.
	$(BIN)/metier demo

test: $(STAMP)  ## Run the default tests: offline, on the CPU, a few minutes.
	$(BIN)/python -m pytest $(IN_PARALLEL)

test-all: $(EXTRAS)  ## Run every test, the slow ones too.
	$(BIN)/python -m pytest -m "not gpu and not network or slow or golden"

check: format lint types test  ## Format, lint, types, tests: what CI runs.

format: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

constraints: $(EXTRAS)  ## Freeze what is installed into constraints.txt.
	@head -1 constraints.txt > constraints.new
	@$(BIN)/pip freeze --exclude-editable | sed -E 's/^(torch==[^+]*)\+.*/\1/' >> constraints.new
	@mv constraints.new constraints.txt

clean:  ## Remove the virtual environment and all caches.
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis
