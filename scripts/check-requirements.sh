#!/bin/sh
# Asks pip whether requirements.txt and requirements-gpu.txt can each be installed on a machine with Linux, x86-64: a dry
# run that downloads metadata and no packages (about a minute). Where no package index is reached it says so, and is a
# failure in CI alone.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

[ "$("$python" -c 'import pip; print(int(pip.__version__.split(".")[0]) >= 25)')" = True ] || {
  echo "$0: pip 25 or newer is needed, as make setup installs it: older ones download gigabytes for a dry run" >&2
  exit 1
}
if ! pip index versions vllm --retries 1 --timeout 15 >/dev/null 2>&1; then
  echo 'NOT TESTED: no package index with vllm is reached, so nobody knows whether requirements-gpu.txt resolves' >&2
  [ -z "${CI-}" ] || exit 1
  exit 0
fi
made=$(mktemp)
trap 'rm -f "$made"' EXIT
for file in requirements.txt requirements-gpu.txt; do
  # Three equals signs, since two would take a CPU build where one is offered, and leave out what the CUDA build needs.
  sed 's/^torch==/torch===/' "$file" >"$made"
  pip install --quiet --quiet --dry-run --ignore-installed --requirement "$made" || {
    echo "$0: $file cannot be installed; scripts/pin-requirements.sh makes it again" >&2
    exit 1
  }
  echo "$file resolves"
done
