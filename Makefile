# Everything runs in .venv, made on demand from constraints.txt.
# PYTHON picks the interpreter (>= 3.10): make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-matrix fuzz check docs wheel dist sanitize gpu format lock clean
# What is installed beside the package; `integrations` brings Lightning, transformers, …
EXTRAS ?= demo,onnx,dev,docs

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing; the kernels, 3 instruction sets by 4 dtypes, compile for some minutes once'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[$(EXTRAS)]'
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

# Nothing is fetched; tutorials and figures are computed while the site is built.
SITE := build/site
docs: $(STAMP) ## Build the documentation as a site in build/site, and check its pages
	rm -rf $(SITE) build/doctrees
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs $(SITE)
	NORMKIT_SITE=$(SITE) $(BIN)/python -m pytest -q -p no:cacheprovider tests/website

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

# One environment for each version; the wheel in it has the kernels of the checkout.
TORCH  ?= 2.6 2.9 newest
TESTS  ?= tests
# With 0.3.2, 0.5.7 and 0.7.2 the exporter of torch 2.6 fails on torch's batch norm, too.
OLD_ONNXSCRIPT = build/matrix/2.6/bin/python -m pip install --quiet \
	--disable-pip-version-check --no-deps 'onnxscript<0.3'
test-matrix: $(STAMP) ## Run the suite on each version of torch in TORCH ("2.6 2.9 newest")
	rm -rf build/matrix-wheel
	$(BIN)/python -m pip wheel --quiet --no-deps \
		-w build/matrix-wheel .
	@failed=; for torch in $(TORCH); do \
		$(MAKE) --no-print-directory matrix-$$torch || failed="$$failed $$torch"; \
	done; test -z "$$failed" || { echo "failed on torch$$failed"; exit 1; }

matrix-%:
	$(PYTHON) -m venv build/matrix/$*
	build/matrix/$*/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(filter newest,$*),torch,'torch==$*.*') \
		"$$(echo build/matrix-wheel/normkit-*.whl)[test,onnx]"
	$(if $(filter 2.6,$*),$(OLD_ONNXSCRIPT))
	build/matrix/$*/bin/python -c 'import torch; print("torch", torch.__version__)'
	cd build/matrix/$* && env -u PYTHONPATH bin/python -m pytest -q -n 2 \
		--dist worksteal -p no:cacheprovider -c ../../../pyproject.toml \
		--rootdir ../../.. $(addprefix ../../../,$(TESTS))

# What an index would refuse is found here; `wheels.yml` publishes what it builds itself.
RELEASE := build/release
dist: $(STAMP) ## Build and check what is released: sdist, wheel from it, metadata, symbols
	rm -rf build/dist build/from-sdist
	@test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt build twine auditwheel check-jsonschema
	$(RELEASE)/bin/python -m build --sdist --outdir build/dist .
	mkdir -p build/from-sdist && tar -xf build/dist/normkit-*.tar.gz -C build/from-sdist
	$(RELEASE)/bin/python -m build --wheel --outdir build/dist \
		-C cmake.define.NORMKIT_ISAS=baseline build/from-sdist/normkit-*
	$(RELEASE)/bin/twine check --strict build/dist/*
	$(RELEASE)/bin/auditwheel show build/dist/*.whl
	$(RELEASE)/bin/check-jsonschema --builtin-schema vendor.github-workflows \
		.github/workflows/*.yml

# A library with sanitizers needs their run-time before everything else; leaks are Python's.
SANITIZED := build/sanitize
sanitize: $(STAMP) ## Run the tests of the C++ kernels under ASan and UBSan
	cmake -S . -B $(SANITIZED) -DNORMKIT_SANITIZE=address,undefined \
		'-DNORMKIT_ISAS=baseline;avx2' > /dev/null
	cmake --build $(SANITIZED) --parallel 2
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 NORMKIT_CPU_LIBRARY=$(SANITIZED)/_native.so \
	$(BIN)/python -m pytest -q -x -p no:cacheprovider --capture=sys \
		tests/kernels/test_cpu.py tests/kernels/test_cpu_fused.py tests/kernels/test_signatures.py tests/kernels/test_bfloat16_in_twos.py tests/functional/test_routes.py tests/functional/test_sum_norm.py tests/kernels/test_batch_invariance.py

# On a machine with a GPU: its own python, torch and triton; nothing is installed.
gpu: ## On a CUDA device: check the GPU kernels at real shapes, then time them, in 8 minutes
	PYTHONPATH=src:tests:. $(PYTHON) -m benchmarks.gpu --budget 480

format: $(STAMP) ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## Renew constraints.txt: one version of everything, for each Python
	$(BIN)/python -m pip install --quiet uv
	echo 'torch==2.13.0' | $(BIN)/uv pip compile --quiet --universal \
		--python-version 3.10 --extra demo --extra onnx --extra dev --extra docs \
		--no-annotate --no-header \
		--constraints - pyproject.toml \
	| grep -vE '^(nvidia|cuda|setuptools)' > constraints.new
	(echo '# Tested together; renewed by `make lock`. What torch brings along is left to it.'; \
		cat constraints.new) > constraints.txt
	rm constraints.new

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist src/normkit/kernels/cpu/_native.so normkit-demo .pytest_cache .ruff_cache .hypothesis
