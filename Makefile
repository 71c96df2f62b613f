# `make demo` and `make test` do all the set-up they need, on a machine with Python >= 3.10 and g++.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard fxsparse/csrc/*) $(wildcard fxsparse/csrc/*/*)

.PHONY: demo test lint format setup gpu-test clean

demo: $(VENV)/.built
	$(BIN)/fxsparse demo

# Threads of one worker that wait by spinning would take the other worker's cores.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard fxsparse/csrc/*.* fxsparse/csrc/*/*.* examples/cpp/*.cpp)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard fxsparse/csrc/*.* fxsparse/csrc/*/*.* examples/cpp/*.cpp)

setup: $(VENV)/.built

# torch comes first and pinned: an open requirement would bring its CUDA build, gigabytes larger.
$(VENV)/.packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(TORCH) "numpy<3"
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,hypergraph,lint,test]"
	$(BIN)/python -m pip install --quiet --no-deps torchvision==0.15.2 timm==1.0.31
	$(BIN)/python -m pip install --quiet pillow pyyaml huggingface_hub requests
	touch $@

# On a machine with a GPU, whatever its torch: builds in place and runs what needs the device.
gpu-test:
	$(PYTHON) setup.py build_ext --inplace
	$(PYTHON) setup.py -q egg_info
	PYTHONPATH=. $(PYTHON) -m pytest -q -m gpu

clean:
	rm -rf build *.egg-info fxsparse/*.so $(VENV)
