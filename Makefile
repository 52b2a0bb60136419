# make demo: see it work.  make test: everything a change must pass.  make test-fast: the quick part of it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-fast lint lower-bounds docs wheel-check postgres oci-registry chromium clean

venv: $(VENV)/.dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@start=$$(date +%s); $(BIN)/python -m pip install -c constraints.txt -e . && \
	  echo "installed in $$(($$(date +%s) - start)) s"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(VENV)/.run $@

demo: $(VENV)/.run
	$(BIN)/overpaint demo

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# One process per core, each computing on one thread.
test: lint
	OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error $(BIN)/python -m pytest -q -n auto --dist loadscope --no-loadscope-reorder

# What changes in minutes of work: no server, no training, nothing drawn. Under a minute.
test-fast: venv
	OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error $(BIN)/python -m pytest -q -n auto --dist loadscope -m "not slow"

# The main job on the lowest versions of the light dependencies that pyproject.toml allows (from the package index).
lower-bounds: venv
	$(BIN)/python -m tools.lower_bounds

# The docs site, in build/site; a warning is an error. `python -m mkdocs serve` shows it while you write.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Wheel and source archive, built, checked, installed in an environment of their own and used.
wheel-check: venv
	$(BIN)/python -m tools.release

# What the tests need to start a PostgreSQL server of their own; without it they skip what needs one.
postgres:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes install --no-install-recommends postgresql; }

# What the tests need to start an OCI registry of their own; without it they skip what needs one.
oci-registry:
	@command -v docker-registry >/dev/null || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes install --no-install-recommends docker-registry; }

# The browser in which the tests look at the page; without it they skip what needs one.
chromium:
	@command -v chromium >/dev/null || \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq --yes install --no-install-recommends chromium; }

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find overpaint tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
