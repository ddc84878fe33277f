# Every target works by itself in a fresh clone: it makes .venv first, with the versions in constraints.txt.
#   make demo | test | test-all | docs | docs-test | lint          PYTHON=/path/to/python3.12 chooses the interpreter

VENV ?= .venv
JOBS ?= 2
STAMP = $(VENV)/.installed
RUN = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all docs docs-test lint format clean

help:
	@sed -n '2p' Makefile | cut -c3-

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/bootstrap.sh $(wildcard serve/client/pyproject.toml)
	@sh tools/bootstrap.sh $(VENV)
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/mmseq demo

test: $(STAMP)
	$(RUN) pytest -m "not slow" -n $(JOBS) --dist loadfile

test-all: $(STAMP)
	$(RUN) pytest -n $(JOBS) --dist loadfile

docs: $(STAMP)
	$(VENV)/bin/python tools/docs.py

docs-test: $(STAMP)
	$(RUN) pytest tests/test_docs.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
