# make demo   from a bare checkout to a trained adapter and its first words: no GPU; two minutes after the installation
# make test   the tests: offline, no GPU, about six minutes on two cores
# make lint   ruff and mypy
# Each creates .venv when it is missing; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
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
