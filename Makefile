# One environment in $(VENV), one target per job; `make help` lists them.
# Needs Python 3.11 or newer and a package index. Everything can be overridden on the command line:
#   make demo TORCH=torch           torch from the package index (for a machine with a GPU)
#   make test JOBS=8 PYTHON=python3.13

VENV ?= .venv
# The first interpreter on the path that is new enough.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# The pinned torch. Where the package index offers only the CUDA build of it, TORCH_INDEX can name
# an additional index that has the CPU build, a tenth of the size.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# Parallel test processes.
JOBS ?= 2
# Extra arguments: make test ARGS="-k holitom", make demo ARGS="--frames 16".
ARGS ?=
CLIP ?= bikes
REPORT ?= kept.html

BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check
# Models and clips come from wheels, so the hub is never needed.
export HF_HUB_OFFLINE ?= 1
# Tools must not advertise newer versions or successors.
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1
export NO_MKDOCS_2_WARNING ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast matrix lint format docs bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | \
	  while IFS="$$(printf '\t')" read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.demo ## take a real clip through DINOv2 and HoliTom, print the table, write kept.html
	$(BIN)/foveate show --sample $(CLIP) --recipe holitom --retain 0.15 --frames 32 --out $(REPORT) $(ARGS)

test: $(VENV)/.dev ## run the whole test suite
	$(PY) -m pytest -n $(JOBS) $(ARGS)

test-fast: $(VENV)/.dev ## run it with every method on one or two model families
	$(PY) -m pytest -n $(JOBS) -m "not matrix" $(ARGS)

matrix: $(VENV)/.dev ## run every method on every family and renew docs/compatibility.md
	$(PY) -m pytest tests/attach -n $(JOBS) --record-matrix matrix.jsonl $(ARGS)
	$(PY) scripts/compatibility.py matrix.jsonl

lint: $(VENV)/.dev ## check style, spelling, types and layering
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(BIN)/codespell
	$(PY) -m pyright --pythonpath $(PY)
	$(BIN)/lint-imports

format: $(VENV)/.dev ## fix what ruff can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.dev ## build the documentation into site/, failing on any warning
	$(PY) -m mkdocs build --strict --quiet

bench: $(VENV)/.dev ## run the benchmarks and print their tables (minutes)
	$(PY) -m pytest benchmarks --benchmark-enable --benchmark-columns=min,median,rounds \
	  --benchmark-sort=name --timeout=0 $(ARGS)
	@for script in $$(ls benchmarks/*.py | grep -v /test_); do \
	  echo "== $$script"; $(PY) "$$script" || exit 1; done

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) site dist build $(REPORT)
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp file per layer of the environment, so that a second `make` installs nothing.
$(VENV)/.torch:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "foveate needs Python 3.11 or newer and found none; try make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "Creating $(VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(VENV) || { echo "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PIP) install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "Installing foveate with the demo extra"
	@$(PIP) install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the development tools"
	@$(PIP) install --quiet --editable ".[demo,dev]"
	@touch $@
