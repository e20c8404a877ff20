# make install  builds .venv          make demo   synthetic data, a few minutes on a CPU, demo/report.html
# make test     all tests             make check  lint, format, types        make bench  speed benchmarks
# make coverage  all tests, and the lines no test runs
# make PYTHON=python3.12 ...          make demo OUT=demo2                    make test WORKERS=4 ARGS='-k geometry'

PYTHON ?= python3
WORKERS ?= 2
OUT ?= demo
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: install demo test coverage check bench clean

install: $(VENV)/.installed

# torch comes first and with its exact version: an open range would fetch gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[dev,export]'
	touch $@

demo: install
	$(BIN)/scarceseg demo --out $(OUT)

# Tests are many small computations: one thread a process. A file stays in one process, for its fixtures.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

coverage: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term-missing:skip-covered $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/metrics_speed.py
	$(BIN)/python benchmarks/step_speed.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache
