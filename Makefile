# PYTHON=python3.12 make install     picks the interpreter that .venv is made with (default: python3)
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test demo clean

help:
	@echo "make install   create $(VENV) and install qat with its tools (PyTorch: several GB the first time)"
	@echo "make test      install, then every check: ruff, types, tests (scripts/check.sh)"
	@echo "make demo      install, then the demo; its output goes to demo_out/"
	@echo "make clean     remove caches, builds and demo output; $(VENV), runs/ and checkpoints/ stay"
	@echo ""
	@echo "PYTHON=python3.12 make install   picks the interpreter (3.11 or newer; now: $(PYTHON)); remove $(VENV) first to change it"

install: $(STAMP)

# --clear: bin/python is missing, so whatever else is in the folder is of no use
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: qat needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing); name another: PYTHON=python3.12 make install" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu the package python3-venv is needed" >&2; exit 1; }

$(STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "== installing qat and its tools into $(VENV): the first time PyTorch downloads several GB, which takes minutes"
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install -e '.[dev]'
	@touch $@
	@echo "== installed; next: make test, make demo, or $(VENV)/bin/qat --help"

test: install
	PYTHON=$(VENV)/bin/python scripts/check.sh

demo: install
	$(VENV)/bin/python tools/demo.py

clean:
	rm -rf build dist demo_out .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find benchmarks qat scripts tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
