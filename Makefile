# Two commands for a fresh machine: `make demo` and `make test`. Both set everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# modules whose shape annotations are checked while their tests run
SHAPED := adaptok.tokens,adaptok.routing,adaptok.budgets,adaptok.chunking,adaptok.attention,adaptok.losses,$\
adaptok.dc.nearest,adaptok.dc.smoothing,adaptok.dc.router,adaptok.dc.chunker,adaptok.dc.dechunker,$\
adaptok.dc.blocks,adaptok.dc.scaffold,adaptok.dc.position,adaptok.dc.model,adaptok.dc.baseline,$\
adaptok.dc.host,adaptok.dc.modulation,adaptok.split_run,adaptok.reductions,adaptok.reduce_stage,$\
adaptok.chunk_stage,adaptok.host_numbers,adaptok.standing,adaptok.observers,adaptok.plan_notes,$\
adaptok.tracing,adaptok.trace_step

.PHONY: help demo test lint types docs pytest shapes bench clean

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[all]"
	touch $@

$(VENV)/.tools: $(VENV)/.package
	$(BIN)/python -m pip install --quiet --group dev
	touch $@

demo: $(VENV)/.package  ## sample emoji at several budgets and write pictures to demo/
	$(BIN)/adaptok demo --output demo

test: lint types docs pytest shapes  ## all checks, as CI runs them

lint: $(VENV)/.tools  ## style, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.tools  ## static types
	$(BIN)/mypy

docs: $(VENV)/.tools  ## the site, into site/; warnings are errors, no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pytest: $(VENV)/.tools  ## tests, doctests and the code blocks of the documents
	$(BIN)/python -m pytest

shapes: $(VENV)/.tools  ## tests again with the shape annotations checked
	PYTHONPATH=tests $(BIN)/python -m pytest --quiet --durations=0 --durations-min=30 \
	  --jaxtyping-packages=$(SHAPED),shape_checks.check \
	  tests/test_*.py tests/dc -m "not slow" \
	  -k "not test_docs and not refused and not compil and not graph and not ragged_op and not wrong and not varlen and not best_rung"

bench: $(VENV)/.package  ## repeat the figures of benchmarks/results
	$(BIN)/python benchmarks/dechunk.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/dcdit_vs_dit.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/vit_compiled.py

clean:  ## remove what the targets made
	rm -rf $(VENV) demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis
