#!/bin/sh
# Writes requirements.txt and requirements-gpu.txt from pyproject.toml, with uv (pip install uv). What is pinned stays as
# far as pyproject.toml allows, in both files the same; with --upgrade it becomes the newest. Then: check-requirements.sh
set -eu
cd "$(dirname "$0")/.."
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

# pin FILE ARGUMENT...: what FILE holds already are uv's preferences
pin() {
  file=$1
  shift
  uv pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --extra all --extra dev "$@" pyproject.toml --output-file "$file" >/dev/null
}

cp requirements.txt "$made/cpu"
pin "$made/cpu" "$@"
cat "$made/cpu" requirements-gpu.txt >"$made/gpu" 2>/dev/null || true
pin "$made/gpu" --extra gpu "$@"

# Each build of torch brings its own CUDA, or none.
{
  echo '# All packages of the project, pinned: scripts/pin-requirements.sh makes this file from pyproject.toml.'
  grep -vE '^(cuda|nvidia|triton)\b' "$made/cpu"
} >requirements.txt
{
  echo '# The same for machines with an NVIDIA GPU (Linux, x86-64), with vLLM: complete by itself, not to be added to'
  echo '# requirements.txt. Made by scripts/pin-requirements.sh. Why some are not in it: docs/training.md.'
  cat "$made/gpu"
} >requirements-gpu.txt
