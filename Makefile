# Two commands on a fresh machine: `make demo` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := runs/demo

# Where torch comes from. Without an NVIDIA driver that is the index of CPU builds, a tenth of the other builds' size, and
# the usual one where it cannot be reached. TORCH_INDEX= takes the usual one at once.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)

.PHONY: help demo test test-fast test-matrix sweep faults lint check bench docs release-check clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/torch: constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) --retries 0 --index-url $(TORCH_INDEX) torch torchvision 2>/dev/null ||) $(PIP) torch torchvision
	touch $@

.venv/demo: .venv/torch setup.cfg
	$(PIP) -e '.[onnx,demo,report]'
	touch $@

.venv/installed: .venv/demo
	$(PIP) -e '.[onnx,demo,dev,docs]'
	touch $@

demo: .venv/demo  ## train, quantize to 2 bits, evaluate and export on handwritten digits
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

test-matrix:  ## a core of the tests with the oldest, a middle and the newest torch, for docs/reference.md (hours)
	python3 benchmarks/version_matrix.py

release-check:  ## build, install the wheel in an environment of its own, and run the demo from it
	bash benchmarks/release_check.sh

clean:  ## remove the environment and the demo's run
	rm -rf .venv $(DEMO)
