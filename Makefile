# Every target sets up what it needs; a fresh machine needs python3 (3.10 to 3.13) and make only.
# `make gpu` is the exception: it uses the machine's own python3 with its torch and Triton, and no network.
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
INSTALLED := $(VENV)/.installed
# Of a checkout: code for one architecture is enough to import, and tests compile the others.
# A wheel is for those of the user, or for all.
WHEEL_ARCHS := $(XATTN_CUDA_ARCHS)
export XATTN_CUDA_ARCHS ?= 80
TRITON_NEWEST := .triton39

# The interpreter is chosen when Triton is imported, so each way needs a process of its own.
INTERPRETED := OMP_NUM_THREADS=1 TRITON_INTERPRET=1
COMPILED := OMP_NUM_THREADS=1 XATTN_TRITON_ON_CPU=1
PYTEST := $(PY) -m pytest tests -n $(JOBS) --dist worksteal

.PHONY: help setup test test-fast fuzz mutants bench gpu compile-grid static-report evidence style format \
	wheel clean distclean

help:
	@echo "make test          the whole suite, without a GPU"
	@echo "make test-fast     the suite without slow tests, emulation and compile grid"
	@echo "make fuzz          random calls for SECONDS=60 each in the interpreter and emulated; SEED=n repeats"
	@echo "make mutants       mutations of the kernels, each of which must turn a test red"
	@echo "make bench         the main benchmark on this machine; table, JSON and plots"
	@echo "make gpu           tests and benchmarks on a machine with a GPU, offline, with its own python3"
	@echo "make compile-grid  every kernel configuration for every architecture, two Triton versions"
	@echo "make static-report the same in one pass, with what is in each kernel's main loop"
	@echo "make evidence      the whole suite, and docs/evidence.md, the table of what it checked"
	@echo "make style         lint and formatting; make format repairs what it can"
	@echo "make wheel         source distribution, and the manylinux wheel made of it, in dist/"
	@echo "make clean         remove build products and caches; make distclean also the environments"

setup: $(INSTALLED)

# torch first and alone, so that nothing else decides which torch is installed.
$(INSTALLED): $(wildcard requirements/*.txt csrc/*) pyproject.toml setup.py build_backend.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/torch.txt
	$(PIP) install --no-deps -r requirements/triton.txt
	$(PIP) install -r requirements/dev.txt
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

$(TRITON_NEWEST)/.installed: requirements/triton-newest.txt $(INSTALLED)
	$(PIP) install --upgrade --target $(TRITON_NEWEST) --no-deps -r requirements/triton-newest.txt
	touch $@

test: $(INSTALLED)
	$(INTERPRETED) $(PYTEST) -m "not emulated and not compile and not gpu"
	$(COMPILED) $(PYTEST) -m "emulated or compile"

test-fast: $(INSTALLED)
	$(INTERPRETED) $(PYTEST) -m "not slow and not emulated and not compile and not gpu"

SECONDS := 60
SEED :=
FUZZ := FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$(SEED)

fuzz: $(INSTALLED)
	$(FUZZ) $(INTERPRETED) $(PY) -m pytest tests/fuzz/test_fuzz.py -q -s -m "not emulated"
	$(FUZZ) $(COMPILED) $(PY) -m pytest tests/fuzz/test_fuzz.py -q -s -m emulated

mutants: $(INSTALLED)
	PYTHONPATH=.:tests $(PY) -m mutants.mutate --jobs $(JOBS) --table docs/mutants.md

bench: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(PY) -m benchmarks main

# code for the devices that are here, or for all where nvidia-smi does not say
gpu: export XATTN_CUDA_ARCHS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
	2>/dev/null | tr -d . | sort -u | paste -sd ';')
# a machine with nvcc is to try the CUDA kernels too, and says what it lacks for them
gpu: export XATTN_BUILD_CUDA ?= $(if $(CUDA_HOME)$(shell command -v nvcc),1)
gpu:
	$(PYTHON) -m pip --disable-pip-version-check --no-input install --no-build-isolation --no-deps -e .
	$(PYTHON) -m tools.gpu

GRID := $(PY) -m tools.machine_code.triton_grid --jobs $(JOBS) --out benchmarks/results/static

compile-grid: $(INSTALLED) $(TRITON_NEWEST)/.installed
	$(PY) -m tools.machine_code.cuda_grid --jobs $(JOBS) --out benchmarks/results/static
	$(GRID)
	PYTHONPATH=$(TRITON_NEWEST) $(GRID)

REPORT := $(PY) -m tools.machine_code.triton_report --grid --jobs $(JOBS) --out benchmarks/results/static

static-report: $(INSTALLED) $(TRITON_NEWEST)/.installed
	$(REPORT)
	PYTHONPATH=$(TRITON_NEWEST) $(REPORT)
	$(PY) -m tools.machine_code.rivals --out benchmarks/results/static
	$(PY) -m tools.machine_code.cuda_report --jobs $(JOBS) --out benchmarks/results/static
	$(PY) -m tools.machine_code.shared_conflicts --out benchmarks/results/static
	$(PY) -m tools.machine_code.page

EVIDENCE := build/evidence

# build/evidence is emptied first: what an older suite launched proves nothing of these kernels
evidence: $(INSTALLED)
	rm -rf $(EVIDENCE)
	XATTN_EVIDENCE=$(CURDIR)/$(EVIDENCE) $(MAKE) test
	$(PY) -m tools.evidence collect $(EVIDENCE)

CUDA_SOURCES = $(shell git ls-files 'csrc/*.cuh' 'csrc/*.cu' 'csrc/*.h' 'csrc/*.cpp' 'examples/*.cpp')

style: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(if $(CUDA_SOURCES),$(VENV)/bin/clang-format --dry-run --Werror $(CUDA_SOURCES))

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(if $(CUDA_SOURCES),$(VENV)/bin/clang-format -i $(CUDA_SOURCES))

# libcudart_static.a takes from libc what libc has, so that the tag is that of this machine's glibc,
# manylinux_2_34 from there on (pthread_*, sem_*, dlopen); in a manylinux image it is an older one.
# A static libstdc++ would only raise it, to 2_36 with GCC 12 (arc4random, _dl_find_object).
# The code of all architectures stays below 60 MB, also in time: indexes refuse large files.
wheel: $(INSTALLED)
	rm -rf dist
	XATTN_BUILD_CUDA=1 XATTN_CUDA_ARCHS="$(WHEEL_ARCHS)" $(PY) -m build
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir dist dist/*.whl
	rm dist/*-linux_*.whl
	test -z "$$(find dist -size +60000k)"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(TRITON_NEWEST)
