# make demo   set up, quantize the bundled MoE, serve it, answer an HTTP request, print the accuracy table
# make test   set up and run the tests (no GPU needed)
# make test-slow, make lint, make setup, make clean

VENV ?= .venv
PYTHON ?= python3
# GPU machines take vLLM's own wheel, others the CPU build
DEVICE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := $(VENV)/bin
READY := $(VENV)/ready-$(DEVICE)
TEST := $(BIN)/python -m pytest -n 2

.PHONY: setup demo test test-slow lint clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vllm-milo needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$(DEVICE),test]'
	# torch extensions built for another torch than vLLM's break the import of transformers
	$(BIN)/python -c 'import torchvision, torchaudio' 2>/dev/null \
		|| $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

test: setup
	$(TEST) -m 'not slow'

SELECT ?= slow
test-slow: setup
	$(TEST) -m '$(SELECT)'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/type_check.py

clean:
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache *.egg-info
