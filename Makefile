# `make` alone prints this list.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types imports check install clean deb offline-install chaos

help:                 ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: .venv/ready  ## create .venv with everything that developing and running needs

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fedpeft needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[ray,onnx,dev]'
	touch $@

demo: .venv/ready     ## run the embedded federation and print what federating gained (runs/demo/)
	$(BIN)/fedpeft demo --out runs/demo

# The models of the tests are so small that a second thread costs more than it gains, and a
# second process does not. Tests of whole federations start processes of their own; their
# longest files would begin last if those with the most tests went first.
test: check           ## everything that CI runs
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/core tests/client tests/server tests/strategies
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration

check: lint types imports

lint: .venv/ready     ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready    ## static types
	$(BIN)/pyright

imports: .venv/ready  ## which package may import which
	$(BIN)/lint-imports

deb: .venv/ready      ## build the package for Debian (dist/)
	$(BIN)/python deploy/debian/build.py dist

offline-install: .venv/ready ## slow: bundle everything and install it without a network
	FEDPEFT_FULL_BUNDLE=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/integration/test_offline_install.py -k whole

chaos: .venv/ready    ## slow: ten minutes of kills and bad links (FEDPEFT_CHAOS_SEED=7 for others)
	FEDPEFT_CHAOS_SECONDS=$${FEDPEFT_CHAOS_SECONDS:-120} OMP_NUM_THREADS=1 $(BIN)/pytest -o log_cli=true -o log_cli_level=WARNING tests/integration/test_chaos.py

clean:                ## remove what was built and installed (not runs/)
	rm -rf .venv dist build
