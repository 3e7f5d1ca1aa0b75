# make demo | test | check. Needs Python 3.11+, make and git; everything else goes into .venv.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps

# Nothing here calls home, and Flower does not install a second copy of every dependency for a run.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER := 0

.PHONY: help demo deploy-demo install test soak check lint types package

help:
	@echo "make demo    train, audit and report on four real hospitals (installs into .venv when needed)"
	@echo "make deploy-demo   the same four hospitals as processes of their own, over gRPC with mutual TLS"
	@echo "make test    all tests; ARGS=\"-m 'not slow'\" leaves out the slow ones"
	@echo "make soak    the tests that take minutes: kill -9 at every line, 8 processes racing, ..."
	@echo "make check   lint, format, types, the wheel and the Flower App Bundle"

demo: $(STAMPS)/demo
	$(BIN)/fedaccord simulate simulations/accords/heart.toml

deploy-demo: $(STAMPS)/demo
	$(BIN)/fedaccord deploy-demo heart --compare

install: $(STAMPS)/test

test: $(STAMPS)/test
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(STAMPS)/test
	$(BIN)/pytest -m soak -n auto -rP $(ARGS)

check: lint types package

lint: $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)/test
	$(BIN)/mypy

package: $(STAMPS)/test
	$(BIN)/pytest tests/test_house.py tests/test_bundle.py

# The stamps lie inside .venv: who deletes it starts afresh. An install is repeated only when
# pyproject.toml is newer than its stamp; the test install holds all that the demo needs.
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("FedAccord needs Python 3.11 or newer; this is %d.%d. Say: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: pyproject.toml | $(STAMPS)/venv
	@echo "Installing into $(VENV): about 4 minutes and 7 GB, most of it PyTorch"
	$(BIN)/pip install -e .
	@touch $@

$(STAMPS)/test: pyproject.toml | $(STAMPS)/venv
	@echo "Installing into $(VENV): about 4 minutes and 7 GB, most of it PyTorch"
	$(BIN)/pip install -e '.[test]'
	@touch $(STAMPS)/demo $@
