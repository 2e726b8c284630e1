# make demo   a picture from a tiny pipeline on 4 CPU processes, compared with one process
# make test   all tests, on 2 workers (WORKERS=4)     make lint      ruff + mypy
# make fuzz   N=5000 random models, not part of the tests   make mutants   plant wrong rules and see that tests notice (docs/mutants.md)
# make docs   the site of docs/, in build/site
# Each of them creates .venv on first use. A torch of your own choice: make demo TORCH="torch==2.12.0 --index-url https://..." (VENV=build/venv-2.12: beside .venv)

VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
WORKERS ?= 2
N ?= 5000
SEED ?= 1
DEMO_OUTPUT ?= demo_output/demo.png
INSTALLED := $(VENV)/.installed

# A torch that is asked for and is not the one installed last is installed now; else the one that is there stays until pyproject.toml changes.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat $(INSTALLED) 2>/dev/null))
.PHONY: $(INSTALLED)
endif
endif

.PHONY: help setup demo test fuzz mutants docs lint clean
help:
	@sed -n '1,/^$$/s/^# //p' Makefile

setup: $(INSTALLED)

# torch first and on its own, so that the requirement in pyproject.toml finds it already there.
$(INSTALLED): pyproject.toml
	@python=""; for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then echo "seqpar needs Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	test -x $(BIN)/python || $$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[diffusers,dev]'
	@echo '$(TORCH)' > $@

demo: setup
	$(BIN)/python -m seqpar.tools.text_to_image --model tiny:flux --device cpu \
	  --prompt "a lighthouse on a cliff, evening light" --ulysses-degree 2 --ring-degree 2 \
	  --width 256 --height 256 --num-inference-steps 4 --seed 0 --compare --output $(DEMO_OUTPUT)

test: setup
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

fuzz: setup
	SEQPAR_FUZZ=$(N) SEQPAR_FUZZ_SEED=$(SEED) $(BIN)/pytest -n $(WORKERS) --dist loadgroup --timeout 0 tests/fuzz $(PYTEST_ARGS)

mutants: setup
	$(BIN)/python -m seqpar.tools.mutate --state build/mutants.jsonl --table docs/mutants.md

docs: setup
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
