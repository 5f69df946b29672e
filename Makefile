# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make a virtual environment first, with
# the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
LATEST ?= .venv-latest
DOCS ?= .venv-docs

.PHONY: install demo test test-slow test-latest lock lint docs

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
	$(VENV)/bin/python -m pytest -m slow

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
	$(LATEST)/bin/python -m pip install -q -e ".[dev]"
	grep '^#' constraints.txt > constraints.txt.tmp
	$(LATEST)/bin/python -m pip list --format=freeze | sed 's/+[a-z0-9]*$$//' | tr 'A-Z_' 'a-z-' \
	  | grep -Ev '^(pip|setuptools|wheel|triton|nvidia-.*|cuda-.*|hf-matryoshka-sae)==' | sort >> constraints.txt.tmp
	mv constraints.txt.tmp constraints.txt

# The documentation as a site, in site/. It is read from the source, so neither torch nor the package is installed for it.
docs:
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | $(DOCS)/bin/python -m pip install -q -r /dev/stdin
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# Lint, format, types of the package, spelling; `pre-commit` runs the same on what is committed.
lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python
	$(VENV)/bin/codespell
