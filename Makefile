# make setup | repro | test | lint | coverage | docs | mlflow | kfp-run | compile | submit | image | clean        Nothing outside this folder is touched.

SHELL := /bin/sh
export PATH := $(CURDIR)/.venv/bin:$(PATH)
INSTALLED := .venv/.installed

.PHONY: help setup repro test lint unit coverage docs mlflow kfp-run compile submit image clean

help:
	@echo 'make setup    make .venv and install what requirements.txt pins: 2.5 GB, with an NVIDIA GPU 6.3 GB (TORCH=cpu or cuda'
	@echo '              decides); with REQUIREMENTS=requirements-gpu.txt vLLM as well, about 9.5 GB'
	@echo 'make repro    run the stages of dvc.yaml that have something to do (sets up first if needed);'
	@echo '              PARAMS="params/qwen2.5-vl-7b.yaml …" writes the settings of these files into params.yaml first'
	@echo 'make test     lint, check types, run the tests'
	@echo 'make lint     lint and check types'
	@echo 'make coverage run the tests and measure what they cover; fails under the floor in pyproject.toml'
	@echo 'make docs     build the documentation as a site, site/index.html'
	@echo 'make mlflow   show runs and versions at http://127.0.0.1:5000'
	@echo 'make kfp-run  run the same stages as the pipeline that a cluster runs, here'
	@echo 'make compile  write the pipelines for a cluster to pipelines/compiled/'
	@echo 'make submit   run the training pipeline on a cluster: make submit HOST=https://… [ARGS=…]'
	@echo 'make image    build the images of the tasks, localhost/adfm:cpu and localhost/adfm:gpu'
	@echo 'make clean    remove .venv and caches; data, models and runs stay'

# What was asked for last time holds until something else is asked for.
-include .venv/setup.mk
# Which build of torch: cpu, cuda, or auto, which is cuda where an NVIDIA GPU is found.
TORCH ?= auto
# What to install: requirements-gpu.txt has vLLM as well.
REQUIREMENTS ?= requirements.txt

setup:
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	  for python in "$(PYTHON)" python3 python3.13 python3.12 python3.11; do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=; \
	  done; \
	  [ -n "$$python" ] || { echo 'make: Python 3.11 or newer with its venv module is needed (Debian, Ubuntu: the package' \
	    'python3-venv); install it, or say where it is: make setup PYTHON=/path/to/python3' >&2; exit 1; }; \
	  "$$python" -m venv --clear .venv; }
	@echo 'installing what $(REQUIREMENTS) pins into .venv: 2 or 3 minutes, and the time of the download'
	python scripts/install_torch.py --torch '$(TORCH)' --requirements '$(REQUIREMENTS)'
	python -m pip install --quiet --disable-pip-version-check -r '$(REQUIREMENTS)'
	python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@printf '%s\n' 'TORCH ?= $(TORCH)' 'REQUIREMENTS ?= $(REQUIREMENTS)' >.venv/setup.mk
	@touch $(INSTALLED)

$(INSTALLED): requirements.txt requirements-gpu.txt pyproject.toml
	@$(MAKE) --no-print-directory setup

repro: $(INSTALLED)
	@git rev-parse --git-dir >/dev/null 2>&1 || python -m dvc config --local core.no_scm true
	@grep -qE '^(register|validate|warmup):' params.yaml || exit 0; \
	  echo 'params.yaml: renaming the sections that have new names'; python -m adfm params params.yaml --params params.yaml
	$(if $(PARAMS),python -m adfm params params.yaml --params params.yaml $(PARAMS:%=--params %))
	python -m dvc repro

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy

test: lint unit

# Files come in the order of tests/conftest.py: xdist's, by their number of tests, has those with few and long ones last.
unit: $(INSTALLED)
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Apart from `unit`, since measuring costs CPU time, less of it by sys.monitoring, which Python has from 3.12 on.
coverage: $(INSTALLED)
	if python -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then export COVERAGE_CORE=sysmon; fi; \
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	  --hypothesis-profile=ci --cov --cov-report=term --cov-report=xml

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo site/index.html

mlflow: $(INSTALLED)
	@echo 'experiments: http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db

kfp-run: $(INSTALLED)
	python -m pipelines.training run $(ARGS)

compile: $(INSTALLED)
	env -u ADFM_CPU_IMAGE -u ADFM_GPU_IMAGE python -m pipelines.training compile
	env -u ADFM_CPU_IMAGE -u ADFM_GPU_IMAGE python -m pipelines.promotion compile

submit: $(INSTALLED)
	python -m pipelines.training submit --host "$(HOST)" $(ARGS)

# BUILD_ARGS, e.g. --build-arg BASE=… or --volume …, goes to the builder as it is.
BUILDER ?= $(shell command -v podman || command -v docker || echo podman)
TARGETS ?= cpu gpu

image:
	@for target in $(TARGETS); do \
	  $(BUILDER) build --file Containerfile --target $$target --tag localhost/adfm:$$target $(BUILD_ARGS) \
	    --build-arg VERSION="$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' adfm/__init__.py)" \
	    --build-arg COMMIT="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" . || exit 1; \
	done

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
