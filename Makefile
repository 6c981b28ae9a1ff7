# Needs Python 3.11+ and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv/.installed-docs
# `convert` would bring PyTorch, for one reader's tests, which are skipped without it.
EXTRAS ?= experiments,dev
# The core, but for its longest tests.
OLDEST ?= tests/test_nowcast.py tests/test_drift.py tests/test_optax_contract.py tests/test_frameworks.py \
	tests/test_store.py tests/test_roles.py tests/nowcasters tests/averaging tests/late_phase

.PHONY: help demo test test-all lint types check format docs test-oldest dist clean

help:
	@echo "make demo         train a small CNN with and without nowcasting, print the table, write the plot (some 4 minutes)"
	@echo "make test         lint, types, tests and doctests"
	@echo "make test-all     the same with the slow tests"
	@echo "make test-oldest  the core's tests, with the oldest JAX, Flax, Optax and NumPy that are allowed"
	@echo "make format       format the code and mend what the linter can"
	@echo "make docs         build the site into build/docs, notebooks and all"
	@echo "make dist         build what a release uploads, and run it installed in an empty environment"
	@echo "make clean        remove the environments, what was built, the demo's results and all caches"

demo: $(INSTALLED)
	$(BIN)/wnn-jax demo --no-resume

CHOSEN := -m "not slow"
test-all: CHOSEN :=
test test-all: lint types check

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/pyright

check: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile $(CHOSEN)

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Every warning is an error: a link that leads nowhere, a cell that raises, markup that is none.
docs: $(DOCS_INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

# The lowest versions of all that pyproject.toml names, in an environment of their own.
test-oldest:
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/oldest/bin/uv pip install --quiet --python build/oldest --resolution lowest-direct -e '.[test]'
	build/oldest/bin/uv pip list --python build/oldest | grep -E '^(jax|jaxlib|flax|optax|numpy) '
	build/oldest/bin/pytest -m "not slow" -W default::DeprecationWarning $(OLDEST)

# What a release uploads, as a user gets it: without extras, in an empty environment outside of the tree.
dist:
	rm -rf dist
	$(PYTHON) -m venv --clear build/dist
	build/dist/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/dist/bin/python -m build
	build/dist/bin/python -m twine check --strict dist/*
	empty=$$(mktemp -d) && trap "rm -rf $$empty" EXIT && for each in dist/*.whl dist/*.tar.gz; do \
		$(PYTHON) -m venv --clear $$empty/venv && \
		$$empty/venv/bin/python -m pip install --quiet --disable-pip-version-check $$each && \
		$$empty/venv/bin/python -I tests/installed.py || exit 1; \
	done

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wnn_jax needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; choose another one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python .venv -e '.[$(EXTRAS)]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/uv pip install --quiet --python .venv -e '.[docs]'
	@touch $@
