PYTHON ?= python3
# Where set-up was done before, its device stays: a cluster's login node has no GPU, its others do,
# and they share this folder.
READY := $(wildcard .venv/ready-*)
DEVICE ?= $(if $(READY),$(READY:.venv/ready-%=%),$(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu))
STAMP := .venv/ready-$(DEVICE)
# Never a download of another Python: the lists are for the versions that pyproject.toml names.
PINS = UV_PYTHON_DOWNLOADS=never .venv/bin/uv pip compile --quiet --universal --no-annotate \
	--no-header --python-version 3.11 --extra test pyproject.toml
HEADER = Made by "make pins" from pyproject.toml. For newer versions: make pins ARGS=--upgrade

.PHONY: help setup demo test lint pins clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf 'make %-7s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## install everything into .venv (PYTHON=python3.11, DEVICE=cpu|gpu)
	@echo ".venv is ready for $(DEVICE)"

$(STAMP): pyproject.toml $(wildcard requirements/*)
	@sh requirements/install.sh "$(PYTHON)" "$(DEVICE)"

demo: $(STAMP)  ## four small runs: bf16 and fp32, sampled by vLLM and by transformers
	.venv/bin/python launch.py -m precision=bf16,fp32 gen=vllm,hf

test: $(STAMP)  ## the tests (ARGS="-k solver -x" goes to pytest)
	.venv/bin/python -m pytest $(ARGS)

lint: $(STAMP)  ## ruff: the rules and the formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

pins: $(STAMP)  ## renew requirements/*.txt from pyproject.toml (ARGS=--upgrade: newest versions)
	$(PINS) --extra cpu --overrides requirements/cpu-overrides.txt -o requirements/cpu.txt $(ARGS)
	$(PINS) --extra gpu -o requirements/gpu.txt $(ARGS)
	@sed -i '1i # $(HEADER)' requirements/cpu.txt requirements/gpu.txt

clean:  ## remove .venv and the caches; results stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
