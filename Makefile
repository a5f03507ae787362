# make demo: everything on the built-in competition. make test: the checks. make run PROFILE=...: the real thing.
# make setup LOCKED=1: the exact versions of requirements.lock, each file checked by its hash.
PYTHON ?= python3
PROFILE ?= profiles/demo.yaml
ARGS ?=
INSTALLED := .venv/.installed
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lab run setup clean

demo: $(INSTALLED)
	@$(BIN)/carvana run profiles/demo.yaml $(ARGS)

run: $(INSTALLED)
	@$(BIN)/carvana run "$(PROFILE)" $(ARGS)

test: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb src/carvana/kaggle/*.ipynb
	@$(BIN)/python -m pytest $(ARGS)

lab: $(INSTALLED)
	@$(BIN)/jupyter lab notebooks

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit(f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(LOCKED),--require-hashes -r requirements.lock,-r requirements.txt -e '.[test]')
	$(if $(LOCKED),$(PIP) --no-deps -e .)
	@touch $(INSTALLED)

clean:
	rm -rf .venv
