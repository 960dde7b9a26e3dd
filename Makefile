# Every target makes its own environment first: a virtual environment in .venv with fasttricks installed in it.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/digits
PY := $(VENV)/bin/python
SOURCES := $(shell git ls-files '*.py')
CXX_SOURCES := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h')

.PHONY: train test test-oldest-triton lint bench bench-traffic docs wheel wheel-matrix clean

$(VENV)/ready: pyproject.toml setup.py build_libraries.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "setuptools>=70.1" wheel ninja "torch>=2.10" torchvision
	$(PY) -m pip install -q --no-build-isolation -e ".[train,timm,test]"
	touch $@

# The libraries again wherever a source is newer; ninja knows which.
.PHONY: libraries
libraries: $(VENV)/ready
	@$(PY) setup.py -q build_ext --inplace

train: libraries
	$(PY) -m fasttricks.train --data digits --model resnet50d --recipe baseline --out $(RUNS)/baseline --overwrite
	$(PY) -m fasttricks.train --data digits --model resnet50d --recipe efficient --out $(RUNS)/efficient --overwrite
	$(VENV)/bin/fasttricks report $(RUNS)/baseline $(RUNS)/efficient --png $(RUNS)/curves.png

# Triton's interpreter replaces its compiler for a whole process: what it runs has one of its own.
test: libraries lint
	$(PY) -m pytest tests
	TRITON_INTERPRET=1 $(PY) -m pytest tests -k "triton or registration"

# The oldest Triton that is claimed, and a NumPy of its time, which its interpreter needs.
OLDEST := build/triton-oldest
test-oldest-triton: libraries
	rm -rf $(OLDEST)
	$(PY) -m pip install -q --no-deps --target $(OLDEST) triton==3.4.0 numpy==2.2.6
	PYTHONPATH=$(OLDEST) TRITON_INTERPRET=1 $(PY) -m pytest $(wildcard tests/test_triton_*.py) \
	  tests/test_avgpool_conv1x1.py -k "test_triton or one_channel or nan_and_infinity"
	PYTHONPATH=$(OLDEST) $(PY) -m pytest tests/static/test_triton_aot.py -k sm_90

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

bench: libraries
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m pytest benchmarks --benchmark-only -s --benchmark-json=build/bench.json
	$(PY) benchmarks/report.py build/bench.json benchmarks/results/cpu.json

# Bytes and launches of the CUDA kernels, emulated: no card is needed.
bench-traffic: libraries
	$(PY) benchmarks/traffic.py

# The site, in build/site. Building it needs no network once its packages are installed.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

$(VENV)/docs: $(VENV)/ready
	$(PY) -m pip install -q --no-build-isolation -e ".[docs]"
	touch $@

wheel: $(VENV)/ready
	rm -rf dist
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist

# One wheel under several interpreters: make wheel-matrix PYTHONS="python3.12 .venv-old/bin/python", each with a torch.
PYTHONS ?= $(PY)
wheel-matrix: wheel
	@set -e; for python in $(PYTHONS); do \
	  target=$$(mktemp -d); \
	  $$python -m pip install -q --no-deps --target $$target dist/fasttricks-*.whl; \
	  PYTHONPATH=$$target $$python tests/wheel_smoke.py; \
	  rm -rf $$target; \
	done

clean:
	rm -rf build dist src/fasttricks/lib
