# Every target sets up what it needs. PYTHON is the interpreter that the environment is made from.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
WORKERS ?= 2

.PHONY: quickstart test test-all test-gpu check docs bench wheel clean

# A torch that is already installed is reused; without one, the pinned release is installed first.
$(STAMP): pyproject.toml constraints.txt
	@if $(PYTHON) -W ignore -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -W ignore -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@c=$$(mktemp); v=$$($(BIN)/python -W ignore -c "import torch; print(torch.__version__.split('+')[0])"); \
	 sed "s/^torch==.*/torch==$$v/" constraints.txt > $$c; \
	 $(BIN)/pip install --quiet --disable-pip-version-check -c $$c -e ".[dev]" && rm -f $$c
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/llmkit quickstart

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not gpu"

test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m gpu

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m pytest -q tests/test_architecture.py

docs: $(STAMP)
	@$(BIN)/python -m llmkit.recipe.write_docs

bench: $(STAMP)
	@$(BIN)/python benchmarks/train_sft.py --data $(DATA)

wheel: $(STAMP)
	@$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist runs
