# make setup | repro | test | lint | mlflow | clean        Nothing outside this folder is touched.

SHELL := /bin/sh
export PATH := $(CURDIR)/.venv/bin:$(PATH)
INSTALLED := .venv/.installed

.PHONY: help setup repro test lint mlflow clean

help:
	@echo 'make setup    make .venv and install what requirements.txt pins'
	@echo 'make repro    run the stages of dvc.yaml that have something to do (sets up first if needed)'
	@echo 'make test     lint, check types, run the tests'
	@echo 'make lint     lint and check types'
	@echo 'make mlflow   show runs and versions at http://127.0.0.1:5000'
	@echo 'make clean    remove .venv and caches; data, models and runs stay'

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=; \
	  done; \
	  [ -n "$$python" ] || { echo 'make: Python 3.11 or newer with its venv module is needed; install it, or say' \
	    'where it is: make setup PYTHON=/path/to/python3' >&2; exit 1; }; \
	  "$$python" -m venv --clear .venv; }
	@echo 'installing what requirements.txt pins into .venv: a few minutes, 2.5 GB'
	python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

repro: setup
	@git rev-parse --git-dir >/dev/null 2>&1 || python -m dvc config --local core.no_scm true
	python -m dvc repro

lint: setup
	ruff check .
	ruff format --check .
	mypy

test: lint
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile

mlflow: setup
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow.db

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
