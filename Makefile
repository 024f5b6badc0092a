# make demo   distil the embedded teacher, from a bare Python 3.11 to figures and pictures
# make test   the whole test suite
# make tools  what the tests start beside Python, from Debian (a part of make test; needs root)
# make lint   formatting, lint and types, as CI checks them
# Where a CPU build of torch is wanted: make venv PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: venv demo tools test lint clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"raydistill needs Python 3.11 or 3.12, $(PYTHON) is {v[0]}.{v[1]}; choose another: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --progress-bar off $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/raydistill submit --stop-head -- python jobs/dmd2_coco.py

tools: $(STAMP)
	.ci/debian-packages
	-dashboards/get_prometheus $(VENV)/prometheus

test: $(STAMP) tools
	$(VENV)/bin/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

lint: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
