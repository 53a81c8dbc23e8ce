# Every target sets up .venv by itself: `make demo` and `make test` need nothing but Python 3.10 or newer and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*.*)
# A broken kernel must fail the build here, where a user's installation would fall back to the reference path.
INSTALL := AWD_FAST_BUILD=require $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench sanitize clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.quality.demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only --benchmark-columns=min,median,ops,rounds
	$(BIN)/python -m benchmarks.cpu --shape minilm_x8

# Not part of `make test`: minutes under a memory checker. `tests/sanitize.sh valgrind` is the other one.
sanitize: $(VENV)/.test
	PYTHON=$(CURDIR)/$(BIN)/python tests/sanitize.sh address

clean:
	rm -rf $(VENV) build dist *.egg-info awd_fast/*.so demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.build: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) 'setuptools>=77' pybind11
	touch $@

$(VENV)/.demo: $(VENV)/.build $(SOURCES)
	$(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.build $(SOURCES)
	$(INSTALL) --no-build-isolation -e '.[test]'
	touch $@
