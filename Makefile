# Needs Python 3.11+ and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# `convert` would bring PyTorch, for one reader's tests, which are skipped without it.
EXTRAS ?= experiments,dev

.PHONY: help demo test lint types check format clean

help:
	@echo "make demo    train a small CNN with and without nowcasting, print the table, write the plot (3 minutes)"
	@echo "make test    lint, types, tests and doctests"
	@echo "make format  format the code and mend what the linter can"
	@echo "make clean   remove the environment, the demo's results and all caches"

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/python -m experiments.digits --output runs/demo

test: lint types check

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/pyright

check: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wnn_jax needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; choose another one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@
