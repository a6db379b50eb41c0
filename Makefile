# make demo   the whole main job on real photographs, about five minutes on two cores
# make test   every check: format, lint, types, tests
# Both set up a virtual environment in .venv first, and use it again when it is there and current.

PYTHON ?= python3
DATA ?=

.PHONY: demo test setup

demo: .venv/current
	.venv/bin/python examples/demo.py $(if $(DATA),"$(DATA)")

test: .venv/current
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest

setup: .venv/current

# Current means: made after the last change of what is to be installed. constraints.txt pins it.
.venv/current: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mae-scale needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	rm -f .venv/current
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch .venv/current
