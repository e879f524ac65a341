# Two commands do everything: `make book` and `make test`. Each sets up .venv first, from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= embedded
PORT ?= 8000
# Two workers by default: the machine that the times in README.md are meant for has two cores.
WORKERS ?= 2
PYTEST_ARGS ?=
UPGRADE ?=
FILES ?=
SAMPLE ?=
SEED ?= 0
MINUTES ?=
TRUST ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCK := requirements.lock
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(LOCK))
# The stamps name the content that was installed, so a changed lock (or a checkout of an older one) installs again.
LOCKED := $(VENV)/.locked-$(shell cat $(LOCK) | cksum | cut -d' ' -f1)
EDITABLE := $(VENV)/.editable-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d' ' -f1)
# pip's own output, cut down to a running count.
COUNT = awk -v all="$$(grep -c == $(LOCK))" -v tty="$$(test -t 2 && echo 1 || echo 0)" '\
	/^(Collecting|Requirement already satisfied:)/ { n++; name = $$1 == "Collecting" ? $$2 : $$4; sub(/[=<>~!;].*/, "", name); \
		if (tty) printf "\r\033[K  %d/%d %s", n, all, name > "/dev/stderr"; \
		else if (n % 20 == 0) printf "  %d/%d %s\n", n, all, name > "/dev/stderr" } \
	/^Installing collected packages/ { printf "%s  installing\n", tty ? "\r\033[K" : "" > "/dev/stderr" } \
	/ERROR|[Ww]arning: / { print > "/dev/stderr" }'

.PHONY: help env book test conformance mutation lint format notebooks bench serve lock clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Settings: PROFILE=smoke|embedded|glue|paper (now $(PROFILE)), WORKERS=$(WORKERS), PORT=$(PORT), PYTEST_ARGS, PYTHON"

env: $(EDITABLE) ## Set up .venv from requirements.lock (does nothing when it is up to date)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "env 1/4: $(VENV), with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "Python's venv is missing. On Debian: apt-get install python3-venv" >&2; exit 1; }

$(LOCKED): | $(VENV)/bin/python
	@echo "env 2/4: $(TORCH) and what it needs on this machine"
	@$(PIP) install $(TORCH) -c $(LOCK) | $(COUNT)
	@echo "env 3/4: everything in $(LOCK)"
	@$(PIP) install --no-deps -r <(grep -v '# apart' $(LOCK)) | $(COUNT)
	@$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/apart $$(sed -n 's/  # apart$$//p' $(LOCK)) 2>&1 \
		| { grep ERROR >&2 || true; }
	@rm -f $(VENV)/.locked-* && touch $@

$(EDITABLE): $(LOCKED)
	@echo "env 4/4: peftlib itself, from this folder"
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.editable-* && touch $@

book: env ## Execute what changed and build the book into _build/html
	$(BIN)/peftlib book
	@echo "Read it: _build/html/index.html, or make serve"

notebooks: env ## Execute the notebooks that changed, in PROFILE
	$(BIN)/peftlib notebooks --profile $(PROFILE)

test: env lint ## Lint, then all tests (they also execute every notebook and build the book)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

conformance: env ## Check every method on every model family and write results/conformance.json
	PEFTLIB_CONFORMANCE=write $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/conformance $(PYTEST_ARGS)

mutation: env ## Change the code a little, and see what no test notices (FILES, SAMPLE, SEED, MINUTES, TRUST=1)
	$(BIN)/python tools/mutation.py $(FILES) --workers $(WORKERS) --seed $(SEED) \
		$(if $(SAMPLE),--sample $(SAMPLE)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(TRUST),--trust)

lint: env ## Style, formatting, layering and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: env ## Put code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env ## Measure speed and memory of the methods on this machine
	$(BIN)/peftlib bench

serve: ## Serve the built book on this machine
	@test -f _build/html/index.html || { echo "There is no book yet: make book" >&2; exit 1; }
	@echo "http://localhost:$(PORT)"
	$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lock: env ## Write requirements.lock and environment.yml; UPGRADE="name other==1.2" changes these versions
	$(BIN)/python tools/lock.py $(UPGRADE)

clean: ## Remove what was built; .venv and results stay
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
	find peftlib tests tools -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and downloaded caches too
	rm -rf $(VENV) .cache
