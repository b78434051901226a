# Each target does its own set-up on a fresh machine: a virtual environment in .venv, pip with constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check bench gpu-bench clean

demo: $(INSTALLED)
	$(BIN)/bloomery run recipes/tiny.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

bench: $(INSTALLED)
	$(BIN)/python -m bench

gpu-bench: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs
	$(BIN)/python -m bench.train --device cuda

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 13), "bloomery needs Python 3.11 to 3.13; run: make PYTHON=python3.11"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@command -v bwrap > /dev/null || (test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get install -y -q bubblewrap > /dev/null 2>&1) \
		|| echo "bubblewrap is not installed; without it programs are not judged (Debian: apt-get install bubblewrap)"
	touch $@

clean:
	rm -rf .venv runs
