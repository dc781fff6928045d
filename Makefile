# Everything runs in .venv, made on demand from constraints.txt.
# PYTHON picks the interpreter (>= 3.10): make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz check wheel sanitize gpu format lock clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[demo,onnx,dev]'
	@touch $@

demo: $(STAMP) ## Train, diagnose, calibrate, fold: the life cycle on real digits
	$(BIN)/normkit demo

test: $(STAMP) ## Run the test suite
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: $(STAMP) ## Run the test suite with the slow tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --run-slow

fuzz: $(STAMP) ## Run random layers, networks and files for 10 minutes; SEED= repeats a run
	PYTHONPATH=tests $(BIN)/python -m fuzz --seconds 600 $(if $(SEED),--seed $(SEED))

check: $(STAMP) ## Format, lint and type-check without changing anything
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The environment has the wheel, what it requires, and the test runner; no sources.
ALONE  := build/alone
SMOKE  := env -u PYTHONPATH -u NORMKIT_CPU_LIBRARY $(ALONE)/bin/python -m pytest -q -p no:cacheprovider tests/smoke
INSTALL := $(ALONE)/bin/python -m pip install --quiet --disable-pip-version-check
wheel: $(STAMP) ## Build a wheel, with a compiler and without; install and try it alone
	rm -rf $(ALONE) build/no-compiler build/wheels
	$(PYTHON) -m venv $(ALONE)
	$(BIN)/python -m pip wheel --quiet --no-deps -w build/wheels .
	$(INSTALL) -c constraints.txt build/wheels/normkit-*.whl \
		pytest pytest-timeout hypothesis
	NORMKIT_EXPECT=kernels $(SMOKE)
	CC=/bin/false CXX=/bin/false $(BIN)/python -m pip wheel --quiet --no-deps \
		-C build-dir=build/no-compiler -w build/wheels/plain .
	$(INSTALL) --no-deps --force-reinstall build/wheels/plain/normkit-*.whl
	NORMKIT_EXPECT=reference $(SMOKE)

# A library with sanitizers needs their run-time before everything else; leaks are Python's.
SANITIZED := build/sanitize
sanitize: $(STAMP) ## Run the tests of the C++ kernels under ASan and UBSan
	cmake -S . -B $(SANITIZED) -DNORMKIT_SANITIZE=address,undefined \
		'-DNORMKIT_ISAS=baseline;avx2' > /dev/null
	cmake --build $(SANITIZED) --parallel 2
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 NORMKIT_CPU_LIBRARY=$(SANITIZED)/_native.so \
	$(BIN)/python -m pytest -q -x -p no:cacheprovider --capture=sys \
		tests/kernels/test_cpu.py tests/kernels/test_cpu_fused.py tests/functional/test_routes.py tests/functional/test_sum_norm.py tests/kernels/test_batch_invariance.py

# On a machine with a GPU: its own python, torch and triton; nothing is installed.
gpu: ## On a CUDA device: check the GPU kernels at real shapes, then time them, in 8 minutes
	PYTHONPATH=src:tests:. $(PYTHON) -m benchmarks.gpu --budget 480

format: $(STAMP) ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## Renew constraints.txt: one version of everything, for each Python
	$(BIN)/python -m pip install --quiet uv
	echo 'torch==2.13.0' | $(BIN)/uv pip compile --quiet --universal \
		--python-version 3.10 --all-extras --no-annotate --no-header \
		--constraints - pyproject.toml \
	| grep -vE '^(nvidia|cuda|setuptools)' > constraints.new
	(echo '# Tested together; renewed by `make lock`. What torch brings along is left to it.'; \
		cat constraints.new) > constraints.txt
	rm constraints.new

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist src/normkit/kernels/cpu/_native.so normkit-demo .pytest_cache .ruff_cache .hypothesis
