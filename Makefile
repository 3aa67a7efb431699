# make demo   from a bare checkout to a trained adapter and its first words: no GPU; two minutes after the installation
# make test   the tests: offline, no GPU, four to five minutes on two cores
# make lint   ruff and mypy
# Each creates .venv when it is missing. PYTHON=python3.12 picks another interpreter, and
# TORCH_INDEX=https://download.pytorch.org/whl/cpu the CPU build of torch, where the default is CUDA's with several GB (Linux).
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/installed: requirements.txt requirements-dev.txt
	@echo "Installing into .venv; without TORCH_INDEX on Linux this loads several GB (see the Makefile)"
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep -o '^torch[^ ]*' requirements.txt)" --index-url $(TORCH_INDEX))
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(BIN)/python train_qlora.py --config configs/tiny.yaml --overwrite
	$(BIN)/python inference_example.py --mode demo --adapter output_tiny

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv output_tiny
