# make demo   the whole main job on real photographs, about eight minutes on two cores
# make test   every check: format, lint, types, tests
#             With MAE_SCALE_TEST_DATA=FOLDER, in which imagenet_sample_250.tar lies, the quick unit
#             tests that use photographs run once more, on those of ImageNet.
# make quick  format, lint, types, and the unit tests that are quick, in under 90 seconds
# Each of them makes a virtual environment in .venv first, unless a current one is there.

PYTHON ?= python3
DATA ?=

.PHONY: demo test quick checks setup

# The tests of a file stay on one worker, because they share what that worker has made. Files come in
# the order of tests/conftest.py.
PYTEST = .venv/bin/python -m pytest --dist loadfile --no-loadscope-reorder

demo: .venv/current
	.venv/bin/python examples/demo.py $(if $(DATA),"$(DATA)")

# The whole suite runs on what a clone and its packages bring.
BARE = MAE_SCALE_TEST_DATA= $(PYTEST)

# Tests that depend on time or have a Slurm cluster come last, two at a time: they mostly wait.
test: checks
	$(BARE) -n auto -m "not alone"
	$(BARE) -n 2 -m alone
	$(if $(MAE_SCALE_TEST_DATA),$(PYTEST) -n auto -m "photographs and not slow" tests/unit)

quick: checks
	$(BARE) -n auto -m "not slow" tests/unit

checks: .venv/current
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

setup: .venv/current

# The environment is current if it was made after the last change of the dependencies.
# constraints.txt pins their versions.
.venv/current: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mae-scale needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	rm -f .venv/current
	$(PYTHON) -m venv .venv
	@echo "Installing PyTorch and all else into .venv: 5.6 GB in the end, which takes some minutes."
	.venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch .venv/current
