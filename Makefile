# You need Python 3.11 or newer and make. Everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv/.installed-docs
# The extra `convert` brings PyTorch. Without it, a few tests are skipped.
EXTRAS ?= lab,dev
# The tests of the core, without the longest ones.
OLDEST ?= tests/test_nowcast.py tests/test_drift.py tests/test_optax_contract.py tests/test_frameworks.py \
	tests/test_store.py tests/test_roles.py tests/nowcasters tests/averaging tests/late_phase

.PHONY: help demo test test-all lint types check format docs test-oldest dist clean

help:
	@echo "make demo         compare methods on a small CNN; print a table and write plots (about 4 minutes)"
	@echo "make test         check lint and types, run tests and doctests"
	@echo "make test-all     the same, with the slow tests"
	@echo "make test-oldest  test the core with the oldest allowed JAX, Flax, Optax and NumPy"
	@echo "make format       format the code and apply the fixes of the linter"
	@echo "make docs         build the site into build/docs and run its notebooks"
	@echo "make dist         build wheel and sdist, and try both in an empty environment"
	@echo "make clean        remove environments, builds, runs and caches"

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/wnn-jax demo

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

# Every warning is an error, such as a dead link, a cell that raises, or broken markup.
docs: $(DOCS_INSTALLED)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

# The lowest versions that pyproject.toml allows, in a separate environment.
test-oldest:
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/oldest/bin/uv pip install --quiet --python build/oldest --resolution lowest-direct -e '.[test]'
	build/oldest/bin/uv pip list --python build/oldest | grep -E '^(jax|jaxlib|flax|optax|numpy) '
	build/oldest/bin/pytest -m "not slow" -W default::DeprecationWarning $(OLDEST)

# Tries what a release uploads, without extras, in an empty environment outside of the repository.
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
