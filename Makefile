# `make demo` trains a ResNet-18 with and without fastres; `make test` runs every check. Both set everything up.
# PYTHON chooses the interpreter (3.10 or newer), VENV the virtual environment, ARGS is passed on.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
INPUTS := setup.py pyproject.toml constraints.txt fastres/_version.py

.PHONY: help demo test lint docs bench aot record clean
.NOTPARALLEL:

help:
	@echo "make demo   train a ResNet-18 on the digits, eager PyTorch beside fastres (about 3 minutes on two cores)"
	@echo "make test   lint, types and all tests        ARGS='tests/test_x.py -k name' narrows the tests"
	@echo "make lint   ruff, mypy and the documentation alone"
	@echo "make docs   the documentation site, into build/site"
	@echo "make bench  eager against fastres on this machine's device"
	@echo "make aot    what every kernel compiles to for sm_80, sm_90 and sm_100"
	@echo "make record the same for the tables in tests/compiled, after a kernel has changed (both versions of Triton)"
	@echo "make clean  remove the environment and caches"

demo: $(VENV)/.ready-train
	$(BIN)/python examples/train.py configs/resnet18_digits.py --compare $(ARGS)

# Other people's packages may fail to install: then the tests beside them are skipped, and the next call tries again.
test: $(VENV)/.ready-test
	@[ -e $(VENV)/.ready-peers ] || { $(BIN)/python tests/set_up_peers.py && touch $(VENV)/.ready-peers; } || true
	$(BIN)/python tests/run.py $(ARGS)

lint: $(VENV)/.ready-test
	$(BIN)/python tests/run.py --only lint

docs: $(VENV)/.ready-test
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

bench: $(VENV)/.ready-test
	$(BIN)/python -m pytest benchmarks $(ARGS)

aot: $(VENV)/.ready-test
	$(BIN)/python -m tests.aot --report $(ARGS)

record: $(VENV)/.ready-test
	$(BIN)/python tests/run.py --record

# $(call install,EXTRA): the environment carries a mark while pip works on it. A mark found at the start is that of an
# interrupted run, whose half-installed packages pip would trust, so the environment is then made anew.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "fastres needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another: make $@ PYTHON=python3.11" >&2; exit 1; }
	@if [ -e $(VENV)/.unfinished ]; then echo "set-up was interrupted: starting over"; rm -rf $(VENV); fi
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	    echo "could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@touch $(VENV)/.unfinished
	$(PIP) -e '.[$(1)]' -c constraints.txt
	@rm $(VENV)/.unfinished
endef

$(VENV)/.ready-train: $(INPUTS)
	$(call install,train)
	@touch $@

$(VENV)/.ready-test: $(INPUTS)
	$(call install,test)
	@rm -f $(VENV)/.ready-peers
	@touch $@ $(VENV)/.ready-train

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
