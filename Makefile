# make demo    the whole pipeline on synthetic shapes, one table and one picture
# make test    every test; make check: format, lint, types and the fast tests
# make trials  what takes too long for a test: kills, damaged files, an hour in one process
# make bench   every benchmark against other software, and docs/benchmarks.md
# make docs    the documentation, into site/; make tables fills the pages' tables from records
# make setup   only create .venv and install everything in it

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check trials bench tables docs clean

setup: .venv/.installed

.venv/.installed: setup.py pyproject.toml constraints.txt robust_backbones/commands/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, found %s: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip uninstall --quiet --yes opencv-python-headless  # of an earlier setup: its files are opencv-python's
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python tools/install_detectron2.py --constraint constraints.txt
	@touch $@

demo: setup
	$(BIN)/python -m robust_backbones demo --output demo_output

# Each test process on a core of its own: threads of several that share cores wait for each other. A file's tests run in
# one process, which makes its fixtures once. Compiled files are kept, whatever the environment says: else every process
# that a test starts compiles the package again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m 'not slow'

# Hours; a short form is among the slow tests.
trials: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/trials/kill.py --random 200 --inside 100 --disk 30 --writers 30 --rank 4 --world 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/trials/fuzz.py --inputs 100000
	OMP_NUM_THREADS=1 $(BIN)/python tests/trials/soak.py --minutes 120

bench: setup
	OMP_NUM_THREADS=1 $(BIN)/python tools/benchmark.py all --data $${ROBUST_BACKBONES_DATA:?names the folder of real images, see CONTRIBUTING.md}
	$(BIN)/python tools/benchmark.py page --add runs/benchmarks

tables: setup
	$(BIN)/python tools/tables.py

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf .venv site demo_output *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
