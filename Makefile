# make demo [DATA=folder|zip|cifar10|...] [MINUTES=2] [AGAIN=1] [PORT=3000] [CHECK=1]
# make check (format, lint, types, site, fast tests)     make test (the same with all tests)     make docs     make lock
PYTHON ?= python3
DATA ?= shapes
MINUTES ?= 2
PORT ?= 3000
YES = 1 true yes on
BIN = .venv/bin
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: demo check test lint docs lock

demo: .venv/ready
	@$(BIN)/python demo.py --data "$(DATA)" --port "$(PORT)" --minutes "$(MINUTES)" $(if $(filter $(YES),$(AGAIN)),--again) $(if $(filter $(YES),$(CHECK)),--check)

check: lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not browser"

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/biome check ui
	$(SITE)

docs: .venv/ready
	$(SITE)
	@echo "The site is in site/index.html; with its search at http://127.0.0.1:8000 after python -m http.server -d site"

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Twinview runs on Python 3.11 to 3.13 and $(PYTHON) is another: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Setting up .venv: about 7 GB, once."
	@$(PYTHON) -m venv .venv || { \
	  echo "$(PYTHON) cannot make environments: on Debian and Ubuntu, apt install python3-venv."; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --upgrade \
	  --extra gpu --extra page --extra train --group dev pyproject.toml -o requirements.lock
