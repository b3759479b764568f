# On a fresh machine with Python 3.11 and make, `make demo` or `make test` alone does all it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= out/demo
INSTALLED := $(VENV)/installed
# A worker per core, each with one thread of torch; a file's tests stay together, for what they share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

VERL := .venv-verl

.PHONY: help install demo test verl slow timing doctest docs dist lint types check clean

help:  ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

install: $(INSTALLED)  ## create .venv and install sparkjoy with all extras

# torch first, alone and exactly pinned: any other way may bring gigabytes of CUDA packages.
$(INSTALLED): pyproject.toml requirements/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/constraints.txt
	$(BIN)/pip install --quiet -c requirements/constraints.txt -e '.[dev]'
	touch $@

demo: install  ## the main job: quality against cost on MNIST, in about two minutes
	$(BIN)/sparkjoy pareto mnist --out $(DEMO_OUT)

test: install  ## the fast tests
	$(PYTEST) -m "not slow and not timing"

verl: $(VERL)/installed  ## the tests of the gate in verl, in .venv-verl: verl and TRL do not go into one environment
	PYTHONPATH=$(CURDIR)/src OMP_NUM_THREADS=1 $(VERL)/bin/python -m pytest tests/with_verl

$(VERL)/installed: requirements/constraints.txt requirements/verl.txt
	$(PYTHON) -m venv $(VERL)
	$(VERL)/bin/pip install --quiet -r requirements/constraints.txt
	$(VERL)/bin/pip install --quiet -c requirements/constraints.txt -r requirements/verl.txt
	$(VERL)/bin/pip install --quiet --no-deps verl==0.9.1
	touch $@

slow: install  ## the slow tests
	$(PYTEST) -m slow

timing: install  ## ratios of seconds within one run, with nothing else running
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m timing

doctest: install  ## every example in the docstrings and the pages; the README's runs in the tests
	$(PYTEST) --doctest-modules --ignore=src/sparkjoy/integrations/verl.py src/sparkjoy src/sparkjoy_lab
	$(BIN)/python -m pytest --doctest-glob='*.md' docs

docs: install  ## the site, in out/site; a link or name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	! grep -l '<blockquote>' out/site/*/index.html  # an example taken for a quotation

dist: install  ## wheel and sdist, in dist; the README's code runs on the wheel, away from the source
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/pip install --quiet --no-deps --target dist/unpacked dist/*.whl
	cd dist && PYTHONPATH=unpacked ../$(BIN)/python -P ../tests/wheel.py ../README.md

lint: install  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: install  ## mypy
	$(BIN)/mypy

check: test verl slow timing doctest docs dist lint types  ## all of it

clean:  ## remove the environment and the outputs
	rm -rf $(VENV) $(VERL) out .pytest_cache .mypy_cache .ruff_cache
