# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make a virtual environment first, with
# the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
LOWEST ?= .venv-lowest
WHEEL ?= .venv-wheel
RELEASE ?= .venv-release
DOCS ?= .venv-docs

.PHONY: install demo test test-slow test-release test-latest lock lint docs notebooks wheel test-lowest release-check

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(VENV)/bin/matryoshka-sae demo

test: install
	$(VENV)/bin/python -m pytest -m "not slow"

test-slow: install
	$(VENV)/bin/python -m pytest -m "slow and not release"

test-release: install
	$(VENV)/bin/python -m pytest -m release

# The quick tests with the newest versions that pyproject.toml admits, in an environment of their own.
test-latest:
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install -q --upgrade --upgrade-strategy eager torch
	$(LATEST)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e ".[dev]"
	$(LATEST)/bin/python -m pip list --format=freeze
	$(LATEST)/bin/python -m pytest -m "not slow"

# Take the newest versions, of all but torch, into constraints.txt. Commit it only with `make test test-slow` green.
lock:
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(LATEST)/bin/python -m pip install -q -e ".[dev,trackio,onnx]"
	grep '^#' constraints.txt > constraints.txt.tmp
	$(LATEST)/bin/python -m pip list --format=freeze | sed 's/+[a-z0-9]*$$//' | tr 'A-Z_' 'a-z-' \
	  | grep -Ev '^(pip|setuptools|wheel|triton|nvidia-.*|cuda-.*|hf-matryoshka-sae)==' | sort >> constraints.txt.tmp
	mv constraints.txt.tmp constraints.txt

# The documentation as a site, in site/. It is read from the source, so neither torch nor the package is installed for it.
docs:
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -q --upgrade "pip>=25.1"
	$(DOCS)/bin/python -m pip install -q --group docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# Lint, format, types of the package, spelling; `pre-commit` runs the same on what is committed.
lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python
	$(VENV)/bin/codespell

$(RELEASE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install -q --upgrade "pip>=25.1"
	$(RELEASE)/bin/python -m pip install -q --group release
	touch $@

# Run the notebooks in place, with the versions of constraints.txt; two minutes each on two cores.
notebooks: install $(RELEASE)/.installed
	$(RELEASE)/bin/uv pip install -q --python $(VENV)/bin/python -c constraints.txt --group notebooks
	$(VENV)/bin/python .ci/notebooks.py examples/notebooks

# Build the package, and use the wheel where nothing else is.
wheel: $(RELEASE)/.installed
	rm -rf dist
	$(RELEASE)/bin/python -m build -q
	$(RELEASE)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(WHEEL)
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt torch
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt "$$(ls dist/*.whl)[metrics]"
	.ci/use-wheel $(WHEEL)

# The quick tests with the lowest versions that pyproject.toml admits, in an environment of their own.
test-lowest: $(RELEASE)/.installed
	$(RELEASE)/bin/uv venv -q --clear --python $(PYTHON) $(LOWEST)
	$(RELEASE)/bin/uv pip compile -q --resolution lowest-direct --python $(LOWEST)/bin/python --extra test -o $(LOWEST)/lowest.txt pyproject.toml
	$(RELEASE)/bin/uv pip install -q --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt
	$(RELEASE)/bin/uv pip install -q --python $(LOWEST)/bin/python --no-deps -e .
	$(LOWEST)/bin/python -m pytest -m "not slow"

# What a release needs besides .ci/run.
release-check:
	.ci/release-check
