# Assumes python3, pip and make, and a package index that pip can reach; nothing else. Everything goes into .venv.
#   make demo    install the package and fuse a real feature-network model: report, launches, speed, differences
#   make test    install what the tests need, then lint, types, tests
#   make bench   the figures of README.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt
# Named beside -c on every line: a pip that resolves `torch>=2.11` by itself takes the newest build with its CUDA packages.
TORCH := $(shell grep '^torch==' $(PINS))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(PINS) "$(TORCH)"

.PHONY: demo test lint types bench clean

demo: $(VENV)/.installed-bench
	$(BIN)/python examples/demo.py

test: lint types
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/launches.py
	$(BIN)/python benchmarks/feature_networks.py
	$(BIN)/python benchmarks/pass_cost.py

# The environment is made anew when what it should hold has changed. A Debian python3 has no ensurepip: virtualenv stands in.
$(VENV)/.made: pyproject.toml $(PINS)
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV) \
	  && $(PYTHON) -m pip --disable-pip-version-check install --quiet --target $(VENV)-maker virtualenv \
	  && PYTHONPATH=$(VENV)-maker $(PYTHON) -m virtualenv --quiet $(VENV) && rm -rf $(VENV)-maker; }
	touch $@

$(VENV)/.installed-test: $(VENV)/.made
	$(PIP) -e ".[test,report,convert]"
	touch $@

# With numpy, without which torch warns at its first conversion.
$(VENV)/.installed-bench: $(VENV)/.made
	$(PIP) -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-maker build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
