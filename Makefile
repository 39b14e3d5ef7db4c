# `make quickstart` and `make test` each set up what they need first.

PYTHON ?= python3
VENV ?= .venv
RUN = HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: quickstart test lint docs docs-check tutorials-check studies-check clean
.DEFAULT_GOAL := quickstart

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

# One thread, because more of them cost processor time on such small images, and save little of yours.
quickstart: $(VENV)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/hf-ibdistill quickstart $(ARGS)

test: $(VENV)/installed
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The site in build/site. A broken link, a page without a place, or an undocumented name is an error.
docs: $(VENV)/installed
	$(RUN) -m sphinx --fail-on-warning --keep-going --nitpicky --quiet --doctree-dir build/doctrees docs build/site

# Runs the tutorials, each within 90 seconds of one processor.
tutorials-check: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) docs/check.py --seconds 90 docs/tutorials/*.md

# Runs every command and example of README.md and docs/.
docs-check: $(VENV)/installed
	$(RUN) docs/check.py $(ARGS)

# Tests of the studies and benchmarks; they take minutes and are no part of the package's suite.
studies-check: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest studies benchmarks $(ARGS)

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .ruff_cache
