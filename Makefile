# Everything that a developer or a newcomer does, one target each. Needs Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
STUBS  := datavector/wire/v1
OUT    ?= demo-out

.PHONY: demo test e2e check bench stubs crds values constraints format clean

demo: $(READY)          ## from images to one merged ONNX model, in minutes
	$(BIN)/datavector demo --output $(OUT)

test: $(READY)          ## every test
	$(BIN)/pytest

e2e: $(READY)           ## the whole story with real Pods: on KUBECONFIG's cluster, on kind, or on a node built here
	$(BIN)/pytest tests/e2e

check: $(READY)         ## style, types, architecture, generated code, charts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_stubs.py
	$(BIN)/python tests/check_crds.py
	$(BIN)/python tests/charts/check_values.py
	$(BIN)/python -m tests.charts.lint

bench: $(READY)         ## tables of measured speed; asserts nothing
	$(BIN)/python -m bench

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

stubs: $(READY)         ## datavector/wire/v1 from proto/
	$(BIN)/python tests/check_stubs.py --write

crds: $(READY)          ## charts/crds/templates from aggregator/resources.py
	$(BIN)/python tests/check_crds.py --write

values: $(READY)        ## the tables of values in charts/*/README.md, from values.yaml
	$(BIN)/python tests/charts/check_values.py --write

constraints: $(READY)   ## images/constraints.txt, at the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra efficientnet --upgrade \
	  --no-annotate --no-header --output-file images/constraints.txt pyproject.toml

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo-out
