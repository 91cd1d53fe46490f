# Every target sets up what it needs. PYTHON is the interpreter that the environment is made from.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
WORKERS ?= 2
HASHED := --quiet --disable-pip-version-check --require-hashes --no-deps --ignore-installed

.PHONY: quickstart test test-all test-gpu check docs bench wheel lock locked clean

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

# What constraints.txt pins and all that it brings, each with the hashes of PyPI's files: see SECURITY.md. `pip install uv`.
UV ?= uv
COMPILE = $(UV) pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes \
 --no-emit-index-url --no-annotate --no-header
# torch and the CUDA libraries that PyPI's build of it brings: who has another build leaves this file out.
OF_TORCH := ^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==

lock:
	@$(UV) --version >/dev/null || { echo "make lock needs uv; fix: pip install uv, or UV=PATH" >&2; exit 1; }
	@t=$$(mktemp -d) && printf 'hatchling\nsetuptools\n' > $$t/build.in && mkdir -p locks \
	 && $(COMPILE) --extra dev -c constraints.txt pyproject.toml $$t/build.in -o $$t/dev.txt >/dev/null \
	 && $(COMPILE) --extra all -c $$t/dev.txt pyproject.toml -o $$t/run.txt >/dev/null \
	 && $(COMPILE) -c $$t/dev.txt $$t/build.in -o locks/build.txt >/dev/null \
	 && awk '/^[a-z]/ {t = /$(OF_TORCH)/} t' $$t/run.txt > locks/torch.txt \
	 && awk '/^[a-z]/ {t = /$(OF_TORCH)/} !t' $$t/run.txt > locks/run.txt \
	 && awk '/^[a-z]/ {t = /$(OF_TORCH)/} !t' $$t/dev.txt > locks/dev.txt \
	 && rm -rf $$t && wc -l locks/*.txt

# The environment from locks/: what has another hash ends it. A torch that is already installed is reused.
locked:
	@rm -rf $(VENV)
	@if $(PYTHON) -W ignore -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/pip install $(HASHED) --only-binary :all: -r locks/build.txt
	@$(BIN)/python -W ignore -c "import torch" 2>/dev/null || $(BIN)/pip install $(HASHED) --only-binary :all: -r locks/torch.txt
	@$(BIN)/pip install $(HASHED) --no-build-isolation -r locks/dev.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

bench: $(STAMP)
	@$(BIN)/python benchmarks/train_sft.py --data $(DATA)

wheel: $(STAMP)
	@$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist runs
