# every target works on a fresh machine with Python 3.11 to 3.14 and make: what it needs, it installs into .venv first.

# the first Python of a version we support; `make PYTHON=/path/to/python` overrides it
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)

# the package as an installed one looks (tileloss/kernels inside tileloss/), by symbolic links. mypy reads it, because
# it cannot follow the import hook of an editable install, and `make gpu` runs from it, because a bare GPU machine need
# not have what an install takes.
TREE := $(CURDIR)/build/tree

OUT ?= benchmarks/results
HAS_GPU := import torch, pytest, sys; sys.exit(not (torch.cuda.is_available() or torch.xpu.is_available()))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test fuzz matrix bench gpu memcheck compile-report docs lint venv tree
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: venv ## train an embedding model on code search, with plots and figures in runs/demo
	@.venv/bin/tileloss train --data builtin --output_dir runs/demo

test: venv ## run the tests (those that need a GPU are left out where there is none)
	@OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist worksteal

matrix: venv ## test under the oldest and the newest of all that is needed, the newest Python and Triton (20 GB)
	@.venv/bin/nox

fuzz: venv ## look for inputs with a wrong answer: $FUZZ_EXAMPLES draws for each property, else 1,000
	@OMP_NUM_THREADS=1 .venv/bin/pytest -v --numprocesses 2 --dist worksteal tests/properties \
		--hypothesis-profile=fuzz --hypothesis-show-statistics

bench: venv ## time the small shapes, then sweep the batch size; results in $OUT, else benchmarks/results
	@.venv/bin/pytest benchmarks --benchmark-only
	@.venv/bin/tileloss bench --out "$(OUT)"

gpu: tree ## on a GPU machine: its tests and its sweep, within ten minutes and without a network
	@python="$(PYTHON)"; \
	if ! "$$python" -c '$(HAS_GPU)' 2>/dev/null; then \
		$(MAKE) --no-print-directory venv || exit 1; python=.venv/bin/python; \
		$$python -c '$(HAS_GPU)' || { echo "make gpu: torch finds no CUDA, ROCm or XPU device here" >&2; exit 1; }; \
	fi; \
	export PYTHONSAFEPATH=1 PYTHONPATH="$(TREE):$(CURDIR)/build/peers$${PYTHONPATH:+:$$PYTHONPATH}"; \
	rm -rf build/peers; \
	for wheel in wheels/*.whl; do [ ! -e "$$wheel" ] || $$python -m pip install --quiet --no-index --no-deps \
		--target build/peers "$$wheel"; done; \
	parallel=$$($$python -c "import xdist" 2>/dev/null && echo "--numprocesses 12 --dist worksteal"); \
	timeout 300 $$python -m pytest -m gpu $$parallel tests/gpu tests/kernels; tests=$$?; \
	timeout 280 $$python -c 'import sys; from tileloss.cli import main; sys.exit(main())' \
		bench --preset gpu --out "$(OUT)"; sweep=$$?; \
	[ $$tests -eq 0 ] && [ $$sweep -eq 0 ] || { echo "make gpu: tests ended with $$tests, the sweep with $$sweep" >&2; exit 1; }

memcheck: tree ## on a GPU machine with CUDA's tools: every function's kernels under compute-sanitizer
	@PYTHONSAFEPATH=1 PYTHONPATH="$(TREE)$${PYTHONPATH:+:$$PYTHONPATH}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool memcheck --error-exitcode 1 \
		"$(PYTHON)" -c 'import sys; from tileloss.cli import main; sys.exit(main())' doctor

compile-report: venv ## compile every kernel for each GPU family, without a GPU, and print what came out
	@.venv/bin/python -P -m tileloss.kernels.compile_report

# without --quiet, which would keep the warnings from --strict
docs: venv ## build the site of the documentation into build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --config-file docs/site/mkdocs.yml

lint: venv tree ## ruff and mypy
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

venv: .venv/.installed ## make .venv and install the project into it (the other targets do so themselves)

.venv/bin/pip:
	@[ -n "$(PYTHON)" ] || { echo "these targets need Python 3.11 to 3.14: make PYTHON=/path/to/one" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/pip
	@echo "installing torch and the development tools into .venv: minutes, but only once"
	@.venv/bin/pip install -qq --constraint constraints.txt torch setuptools
	@.venv/bin/pip install -qq --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@.venv/bin/python -c 'import torch; torch.version.cuda and not torch.cuda.is_available() and print( \
		"note: pip brought the CUDA build of torch, and no GPU is here. All works; to have the smaller CPU build,", \
		"let PIP_EXTRA_INDEX_URL name the index of PyTorch that offers it, delete .venv and run make again")'
	@touch $@

tree:
	@rm -rf "$(TREE)" && mkdir -p "$(TREE)/tileloss"
	@ln -s "$(CURDIR)"/src/tileloss/* "$(CURDIR)"/kernels "$(TREE)/tileloss"
