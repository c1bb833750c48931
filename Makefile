# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo

.PHONY: help demo test test-fast sweep faults lint check bench docs clean

help:  ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/installed: setup.cfg constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[onnx,demo,dev,docs]'
	touch $@

demo: .venv/installed  ## train, quantize to 2 bits, evaluate and export on handwritten digits
	rm -rf $(DEMO)
	$(BIN)/brfx train --model resnet20 --data digits --epochs 8 --output-dir $(DEMO)/fp32
	$(BIN)/brfx quantize --model resnet20 --data digits --ckpt $(DEMO)/fp32/best.pth --bits 2 --qat-epochs 12 \
		--output-dir $(DEMO)/w2a2

test: .venv/installed  ## the tests, under ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/installed  ## the tests that neither compile nor train much
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
		--deselect tests/test_distributed.py --deselect tests/test_sweep.py \
		tests/quant tests/nn tests/graph tests/passes tests/data tests/io tests/analysis tests/config \
		tests/cli/test_options.py tests/test_*.py

sweep: .venv/installed  ## the slow tests too
	$(BIN)/python -m pytest -m "slow or not slow" --timeout=3600

faults: .venv/installed  ## kill, fill up and damage training runs, slow ones too (docs/reliability.md)
	$(BIN)/python -m pytest tests/faults -m "slow or not slow" --timeout=3600

lint: .venv/installed  ## ruff, its format, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## what CI runs

bench: .venv/installed  ## what a training step costs, for docs/benchmarks.md (hours on two cores)
	$(BIN)/python -m pip install -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/train_step.py

docs: .venv/installed  ## the documentation as a site, in site/
	$(BIN)/mkdocs build

clean:  ## remove the environment and the demo's run
	rm -rf .venv $(DEMO)
