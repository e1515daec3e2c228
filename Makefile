# Each target does its own set-up: a virtual environment in .venv, with the versions that constraints.txt pins.
# PYTHON=/path/to/python chooses the interpreter; pip's own PIP_* variables work (PIP_EXTRA_INDEX_URL, for example).

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# The first of these that runs and is new enough. A name on the path may be a stub that does not run.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BENCH := build/bench-venv

INTEGRATIONS := build/integrations

.PHONY: help check test test-gpu test-integrations coverage soak demo docs dist bench clean
help:
	@echo 'make demo    train a small GPT on 2 processes, kill it in ten ways, and compare with the run that was not killed'
	@echo 'make test    the test suite'
	@echo 'make test-gpu  the tests that need a CUDA device: a few minutes'
	@echo 'make test-integrations  trainers, trackers, streams, a notebook, gcsfs: killed and compared, 10 minutes'
	@echo 'make check   formatting, lint, types, which package imports which, prose'
	@echo 'make coverage  the test suite, and which lines it has run'
	@echo 'make soak    the proofs that take long'
	@echo 'make docs    the documentation site, into build/site'
	@echo 'make dist    the wheel and the sdist, installed and tried outside of the repository'
	@echo 'make bench   what checkpoints cost, beside other systems: 45 minutes (BENCH_ARGS=--quick: 3)'
	@echo 'make clean   delete what these make; runs/ stays'

demo: $(READY)
	$(BIN)/harness drill configs/gpt.yaml

test: $(READY)
	$(BIN)/python -m pytest -m 'not soak' -n 4 --dist loadfile --no-loadscope-reorder

# On a machine with CUDA devices; elsewhere all of them are skipped. The variable is read when cuBLAS is first used.
test-gpu: $(READY)
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m gpu -n 0

# The libraries lie beside the environment, whose torch they use.
test-integrations: $(INTEGRATIONS)/ready
	INTEGRATION_LIBRARIES=$(INTEGRATIONS) PYTHONPATH=$(INTEGRATIONS) $(BIN)/python -m pytest -n 2 --dist loadfile tests/integrations

$(INTEGRATIONS)/ready: $(READY) tests/integrations/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(INTEGRATIONS) --requirement tests/integrations/requirements.txt
	@touch $@

# Beside what it takes to count, the tests are the same; no threshold.
coverage: $(READY)
	$(BIN)/python -m pytest -m 'not soak' -n 4 --dist loadfile --no-loadscope-reorder --cov --cov-report=term

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m pymarkdown --add-plugin docs/hooks/prose_rule.py scan -r CHANGELOG.md CONTRIBUTING.md README.md SECURITY.md benchmarks docs tests

# A broken link, or a missing anchor, is an error. The search needs a server, if only python -m http.server.
docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo 'the site is in build/site: python -m http.server -d build/site'

dist: $(READY)
	.ci/dist

soak: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/optimizer-libraries --requirement tests/proofs/optimizer-libraries.txt
	SOAK_LIBRARIES=build/optimizer-libraries $(BIN)/python -m pytest -m soak

# BENCH_ARGS=--quick for a look; without, the results, the tables in benchmarks/README.md and docs/stall.png are written anew.
BENCH_ARGS ?= --publish
bench: $(BENCH)/ready
	$(BENCH)/bin/python benchmarks/checkpoint.py $(BENCH_ARGS)

# A fresh virtual environment in a folder.
define environment
	@python='$(PYTHON)'; "$${python:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "harness needs Python 3.11 or newer; found: $${python:-none}. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo 'installing into $(1), which takes a minute or two'
	@$(PYTHON) -m venv --clear $(1) || { echo 'python -m venv failed (on Debian: apt-get install python3-venv)' >&2; exit 1; }
endef

# Written last, so that an installation that was interrupted is done again.
$(READY): pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# What harness is compared with is nothing that it needs, and has an environment of its own.
$(BENCH)/ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(call environment,$(BENCH))
	$(BENCH)/bin/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt --editable '.[s3]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find harness tests launch benchmarks -name __pycache__ -prune -exec rm -rf {} +
