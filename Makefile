# Every target makes its own environment first: a virtual environment in .venv with fasttricks installed in it.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs/digits
PY := $(VENV)/bin/python
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# pytest on every core; tests that must not run side by side are of one xdist_group
PYTEST := $(PY) -m pytest -q -n logical --maxprocesses 8 --dist loadgroup
# the files that can have a test of Triton: the others take seconds to import
TRITON_TESTS = $(shell grep -lE "triton|registration|backend|raw_ops" tests/test_*.py)
# thousands of tests, which take seconds to collect
BUT_ZOO := --ignore=tests/test_patch_zoo.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# pip does not compile what it installs, so that the first import of a module must keep its bytecode
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train ablate test test-all test-long test-zoo test-oldest-triton libraries lint emulator bench bench-more bench-all bench-check bench-traffic docs sdist wheel wheel-matrix clean

# ResNet-50-D on real scans with both recipes: a table and curves.
train: libraries
	@echo "fasttricks: training ResNet-50-D twice, about 2 minutes each on two cores"
	$(PY) -m fasttricks.train --data digits --model resnet50d --recipe baseline --out $(RUNS)/baseline --overwrite
	$(PY) -m fasttricks.train --data digits --model resnet50d --recipe efficient --out $(RUNS)/efficient --overwrite
	$(VENV)/bin/fasttricks report $(RUNS)/baseline $(RUNS)/efficient --png $(RUNS)/curves.png --html $(RUNS)/report.html

# Sections 3 and 4 of the paper on real scans, three seeds.
ABLATION := --seeds 3 --jobs 2 --data digits --width 8 --image-size 32 --epochs 10
ablate: libraries
	@echo "fasttricks: training 30 small networks; after an interruption, make ablate goes on"
	$(VENV)/bin/fasttricks ablate efficient --out runs/ablate-efficient $(ABLATION)
	$(VENV)/bin/fasttricks ablate tweaks --out runs/ablate-tweaks $(ABLATION)

# The style checks and the tests, in about 10 minutes on two cores. Triton's interpreter replaces its compiler for a whole
# process: what it runs has a run of its own.
test: libraries
	@$(MAKE) --no-print-directory -j 2 lint emulator
	$(PYTEST) tests $(BUT_ZOO) -m "not long and not zoo"
	@echo "fasttricks: the tests of the Triton kernels, in Triton's interpreter"
	TRITON_INTERPRET=1 $(PYTEST) $(TRITON_TESTS) -m "not long and not zoo" -k "triton or registration"

# Everything: hours on two cores, most of them for test-zoo.
test-all: test test-oldest-triton test-long test-zoo bench-check

# Sanitizers and planted faults on the emulated CUDA kernels, tensors past 2^31 elements, Triton for sm_80 and sm_100,
# the older instruction sets, more models.
test-long: libraries
	@echo "fasttricks: compiling the emulator with two sanitizers, about 3 minutes"
	@PYTHONPATH=. $(PY) tests/emulator/emulated.py asan tsan
	$(PYTEST) tests $(BUT_ZOO) -m long

# Every classification model of torchvision and timm: the pairs that fuse finds are counted (about 25 minutes), and
# each model trains fused and not (hours).
test-zoo: libraries
	$(PYTEST) tests -m zoo

# The oldest Triton that is supported, and a NumPy of its time, which its interpreter needs.
OLDEST := build/triton-oldest
test-oldest-triton: libraries
	@echo "fasttricks: installing Triton 3.4 in $(OLDEST), about a minute"
	@rm -rf $(OLDEST)
	@$(PY) -m pip install -q --no-deps --target $(OLDEST) triton==3.4.0 numpy==2.2.6
	PYTHONPATH=$(OLDEST) TRITON_INTERPRET=1 $(PYTEST) $(wildcard tests/test_triton_*.py) \
	  tests/test_avgpool_conv1x1.py -k "test_triton or one_channel or nan_and_infinity"
	PYTHONPATH=$(OLDEST) $(PYTEST) tests/static/test_triton_aot.py -k sm_90

# The virtual environment, with fasttricks installed as editable. Python compiles a module when it is first imported: most
# of torch's never are.
$(VENV)/ready: pyproject.toml setup.py build_libraries.py
	@echo "fasttricks: making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "fasttricks: installing torch and torchvision (3 GB with CUDA), 2 to 5 minutes"
	@$(PY) -m pip install -q --no-compile "setuptools>=70.1" wheel ninja "torch>=2.10" torchvision
	@echo "fasttricks: compiling the kernels, about a minute; 5 minutes more if a CUDA toolkit is installed"
	@$(PY) setup.py -q build_ext --inplace
	@echo "fasttricks: installing fasttricks as editable, and what the trainer and the tests need, about a minute"
	@$(PY) -m pip install -q --no-compile --no-build-isolation -e ".[train,timm,test]"
	@touch $@

# The libraries again if a source is newer; ninja knows which.
libraries: $(VENV)/ready
	@$(PY) setup.py -q build_ext --inplace

emulator: $(VENV)/ready
	@echo "fasttricks: compiling the CUDA kernels for the CPU's emulator, about a minute"
	@PYTHONPATH=. $(PY) tests/emulator/emulated.py plain plans

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

# The operators and a step of ResNet-50-D against eager torch and torch.compile.
BENCH = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(PY) -m pytest --benchmark-only -s
bench: libraries
	$(BENCH) benchmarks/bench_*.py -m "not more" --benchmark-json=build/bench.json
	$(PY) benchmarks/report.py build/bench.json benchmarks/results/cpu.json

# The rest, or a part of it: make bench-more MORE=scaling. Other networks, batches and bfloat16; how times grow; whole
# networks, compiled too; twenty models, fused and not.
MORE ?= bn_relu scaling train_step models
bench-more: libraries
	set -e; for part in $(MORE); do \
	  $(BENCH) benchmarks/bench_$$part.py -m more --benchmark-json=build/bench-more-$$part.json; \
	done
	$(PY) benchmarks/report.py build/bench-more-*.json benchmarks/results/cpu-more.json

# Both, and the operators once more with freed memory kept.
bench-all: bench bench-more
	FASTTRICKS_BENCH_KEEP=1 $(BENCH) benchmarks/bench_bn_relu.py -m more --benchmark-json=build/bench-kept.json

# The operators' speed against eager torch, compared with benchmarks/results/cpu.json if that is of this kind of machine.
bench-check: libraries
	PYTHONPATH=benchmarks $(PY) benchmarks/regression.py

# Bytes and launches of the CUDA and Triton kernels and of a training step, emulated: no card is needed.
bench-traffic: libraries
	PYTHONPATH=.:tests:tests/emulator $(PY) benchmarks/traffic.py
	PYTHONPATH=.:tests:tests/emulator $(PY) benchmarks/step_traffic.py

sdist: $(VENV)/ready
	rm -rf dist/*.tar.gz
	$(PY) -m build --sdist --no-isolation > /dev/null
	@ls dist/*.tar.gz

# The site, in build/site. Building it needs no network once its packages are installed.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

$(VENV)/docs: $(VENV)/ready
	@echo "fasttricks: installing mkdocs, about a minute"
	@$(PY) -m pip install -q --no-build-isolation -e ".[docs]"
	@touch $@

wheel: $(VENV)/ready
	rm -rf dist/*.whl
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

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
