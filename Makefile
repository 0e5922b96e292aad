# Assumes python3, pip and make, and a package index that pip can reach; nothing else. Everything goes into .venv.
#   make demo    install the package and fuse a real feature-network model: report, launches, speed, differences
#   make test    install what the tests need, then lint, types, tests
#   make bench   the figures of README.md, and a part of the grid (GRID="--whole --minutes 600" for all of it: results in .bench/)
#   make zoo     models of other packages: launches before and after, right or wrong, speed (ZOO="--no-time --why subject ...")
#   make stress  a gigabyte of weights, 100,000 calls, a failure in every function: an hour, 4 GB of memory; not in CI
#   make zoo-test   the same as tests, without the table; and training by Lightning and transformers
#   make mutants bugs put into every rule: are they found at run time, and by the tests? (MUTANTS="conv shape --most 200"; about an hour)
#   make census  every architecture of transformers and every module of torch.nn: right or wrong (CENSUS="--jobs 4 --why bert ...")
#   make fuzz    random models for as long as you say (FUZZ="--minutes 60 --seed 7"); what fails is appended to .fuzz/failures.txt
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := constraints.txt
# Some of all bugs (about 13,000), drawn at random: an estimated hour on an idle machine. All of them with MUTANTS= (many hours).
MUTANTS ?= --most 3000
# Named beside -c on every line: a pip that resolves `torch>=2.11` by itself takes the newest build with its CUDA packages.
TORCH := $(shell grep '^torch==' $(PINS))
INSTALL := -m pip --disable-pip-version-check install --quiet
PIP := $(BIN)/python $(INSTALL) -c $(PINS) "$(TORCH)"
# The zoo's packages bring a hundred others: an environment of its own.
ZOO_VENV := .venv-zoo
ZOO_PYTHON := $(ZOO_VENV)/bin/python

# What is checked or measured here reads no plans that were kept before.
export FXFUSE_CACHE := 0

.PHONY: demo test lint types bench zoo zoo-test mutants census fuzz stress clean

demo: $(VENV)/.installed-bench
	$(BIN)/python examples/demo.py

test: lint types
	$(BIN)/python -m pytest -q -n 2 -m "not zoo and not stress"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/launches.py
	$(BIN)/python benchmarks/feature_networks.py
	$(BIN)/python benchmarks/pass_cost.py
	$(BIN)/python benchmarks/guard_cost.py
	$(BIN)/python benchmarks/grid.py $(GRID)

stress: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -s -m stress

zoo: $(ZOO_VENV)/.installed
	$(ZOO_PYTHON) benchmarks/zoo.py $(ZOO)

zoo-test: $(ZOO_VENV)/.installed
	$(ZOO_PYTHON) -m pytest -q -n 2 -m zoo tests/test_zoo.py tests/test_lightning.py tests/test_hugging_face.py

mutants: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m mutants $(MUTANTS)

census: $(ZOO_VENV)/.installed
	$(ZOO_PYTHON) benchmarks/census.py $(CENSUS)

fuzz: $(VENV)/.installed-test
	PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

# An environment is made anew when what it should hold has changed. A Debian python3 has no ensurepip: virtualenv stands in.
%/.made: pyproject.toml $(PINS)
	rm -rf $*
	$(PYTHON) -m venv $* >/dev/null 2>&1 || { rm -rf $* \
	  && $(PYTHON) -m pip --disable-pip-version-check install --quiet --target $*-maker virtualenv \
	  && PYTHONPATH=$*-maker $(PYTHON) -m virtualenv --quiet $* && rm -rf $*-maker; }
	touch $@

$(VENV)/.installed-test: $(VENV)/.made
	$(PIP) -e ".[test,report,convert]"
	touch $@

# With numpy, without which torch warns at its first conversion.
$(VENV)/.installed-bench: $(VENV)/.made
	$(PIP) -e ".[bench]"
	touch $@

# no-deps.txt: packages that ask for others, unused by the models, which cannot be installed beside this torch.
$(ZOO_VENV)/.installed: $(ZOO_VENV)/.made tests/zoo/constraints.txt tests/zoo/no-deps.txt
	$(ZOO_PYTHON) $(INSTALL) -c $(PINS) -c tests/zoo/constraints.txt "$(TORCH)" -e ".[test,zoo]"
	$(ZOO_PYTHON) $(INSTALL) --no-deps -r tests/zoo/no-deps.txt
	touch $@

clean:
	rm -rf .mutants .bench $(VENV) $(VENV)-maker $(ZOO_VENV) $(ZOO_VENV)-maker build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
