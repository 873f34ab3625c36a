# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, made on first use from any Python 3.11 or newer: make PYTHON=python3.12 quickstart
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BUILD := quickstart/build
.DEFAULT_GOAL := help

# Large arrays in huge pages: on Linux CPUs a training step spends up to a third of its time on page faults without.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: quickstart quickstart-clm quickstart-t5 quickstart-bart quickstart-nsp test test-torch test-oldest test-compile test-faults bench bench-compile bench-vocab-head bench-host-pipeline bench-preprocessing bench-first-step style check-style clean

## help: this list
.PHONY: help
help:
	@echo "make TARGET, where TARGET is:"
	@sed -n 's/^## \([a-z0-9-]*\): \(.*\)/\1 \2/p' $(firstword $(MAKEFILE_LIST)) | \
		while read -r target text; do printf '  %-20s %s\n' "$$target" "$$text"; done

$(VENV)/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3"; exit 2; }
	@echo "Installing the libraries into $(VENV): a minute or two, silently ..."
	@$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/development: requirements-dev.txt $(VENV)/runtime
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The only dependency not in a requirements file: on Linux the plain name brings gigabytes of CUDA, so the version is fixed.
$(VENV)/torch: $(VENV)/development
	@echo "Installing PyTorch ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@touch $@

## quickstart: make a corpus, a tokenizer and a model, train it on this machine's CPU, show what it learnt
quickstart: $(VENV)/runtime
	$(RUN) quickstart/python_docs_corpus.py --output_dir $(BUILD)/corpus
	$(RUN) prepare_model_dir.py quickstart/mlm_model.json --overwrite_output_dir
	$(RUN) run_mlm_flax.py quickstart/mlm.json --overwrite_output_dir
	$(RUN) quickstart/fill_mask.py --model_dir $(BUILD)/mlm --corpus_dir $(BUILD)/corpus

## quickstart-clm: the same for a GPT-2, which goes on from the beginning of a paragraph
## quickstart-t5: the same for a T5, which fills gaps in
## quickstart-bart: the same for a BART, which puts damaged text right
SCRIPT_clm := run_clm_flax.py
SCRIPT_t5 := run_t5_mlm_flax.py
SCRIPT_bart := run_bart_dlm_flax.py
quickstart-clm quickstart-t5 quickstart-bart: quickstart-%: $(VENV)/runtime
	$(RUN) quickstart/python_docs_corpus.py --output_dir $(BUILD)/corpus
	$(RUN) prepare_model_dir.py quickstart/$*_model.json --overwrite_output_dir
	$(RUN) $(SCRIPT_$*) quickstart/$*.json --overwrite_output_dir
	$(RUN) quickstart/write_text.py --model_dir $(BUILD)/$* --corpus_dir $(BUILD)/corpus

## quickstart-nsp: the same for pairs of sentences; does the model tell which ones belong together?
quickstart-nsp: $(VENV)/runtime
	$(RUN) quickstart/python_docs_corpus.py --output_dir $(BUILD)/documents --documents
	$(RUN) prepare_model_dir.py quickstart/nsp_model.json --overwrite_output_dir
	$(RUN) run_pretraining_flax.py quickstart/nsp.json --overwrite_output_dir
	$(RUN) quickstart/fill_mask.py --model_dir $(BUILD)/nsp --corpus_dir $(BUILD)/documents

## test: all tests that need neither an accelerator, nor the internet, nor PyTorch
test: $(VENV)/development
	$(RUN) -m pytest

## test-torch: do PyTorch and the Flax model agree on the weights that were saved?
test-torch: $(VENV)/torch
	$(RUN) -m pytest -m torch

## test-oldest: the oldest libraries that requirements.txt allows: a step of each script, in an environment of their own
OLDEST := .venv-oldest
$(OLDEST)/development: requirements.txt requirements-dev.txt
	@echo "Installing the oldest libraries into $(OLDEST) ..."
	@$(PYTHON) -m venv $(OLDEST)
	@sed 's/>=/==/' requirements.txt > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt -r requirements-dev.txt
	@touch $@

test-oldest: $(OLDEST)/development
	$(OLDEST)/bin/python -m pytest tests/test_scripts.py tests/test_nsp.py -k golden

## test-compile: the steps of all scripts, compiled for a TPU and a GPU that are not here
$(VENV)/compilers: pyproject.toml $(VENV)/development
	@echo "Installing compilers for TPUs and GPUs, about 1 GB ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check ".[compile]"
	$(RUN) -m pip uninstall --quiet --yes flaxlm
	@touch $@

test-compile: $(VENV)/compilers
	$(RUN) -m pytest -m compile

## test-faults: kill training twenty times at random moments; takes minutes
test-faults: $(VENV)/development
	$(RUN) -m pytest -m faults

## bench: training throughput on this machine's CPU, beside PyTorch's in float32 and bfloat16; most of an hour on 2 cores
bench: $(VENV)/torch
	for objective in mlm clm t5 bart nsp; do \
		$(RUN) benchmarks/throughput.py --objective $$objective --peer torch --precision float32 bfloat16 --peer_precision float32 bfloat16 || exit; done

## bench-compile: what the original commands take of a TPU v3-8, and larger models of several machines; half an hour
bench-compile: $(VENV)/compilers
	$(RUN) benchmarks/compile_table.py --machines v3-8
	$(RUN) benchmarks/compile_table.py --machines v3-8 h100 -- --dtype bfloat16
	$(RUN) benchmarks/compile_table.py --models llama-1.1b llama-7b --machines v3-8 v5litepod-8 v5p-8 h100:8

## bench-vocab-head: training steps against ones with scores for all tokens and the whole vocabulary
bench-vocab-head: $(VENV)/runtime
	$(RUN) benchmarks/vocab_head.py --objective mlm
	$(RUN) benchmarks/vocab_head.py --objective clm

## bench-host-pipeline: noise and labels for a batch, million tokens per second on one core
bench-host-pipeline: $(VENV)/runtime
	$(RUN) benchmarks/host_pipeline.py

## bench-preprocessing: from text to rows of tokens, by number of processes
bench-preprocessing: $(VENV)/runtime
	$(RUN) benchmarks/preprocessing.py

## bench-first-step: from the command to the first step of training, with an empty and with a filled compilation cache
bench-first-step: $(VENV)/runtime
	$(RUN) benchmarks/time_to_first_step.py

## results: all figures of README.md and benchmarks/RESULTS.md anew, and the pages made of them; an hour on 2 cores
.PHONY: results
results: $(VENV)/torch
	$(RUN) benchmarks/results.py

## style: format and lint; notebooks lose their outputs
style: $(VENV)/development
	$(RUN) tests/strip_notebooks.py
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

## check-style: what `make style` would change, and what it cannot
check-style: $(VENV)/development
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

## clean: remove what the other targets made: environments and quick starts
clean:
	rm -rf $(VENV) $(OLDEST) $(BUILD)
