# `make quickstart` and `make test` each set up what they need first.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: quickstart test lint clean
.DEFAULT_GOAL := quickstart

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(RUN) scripts/quickstart.py $(ARGS)

test: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) outputs *.egg-info .pytest_cache .ruff_cache
