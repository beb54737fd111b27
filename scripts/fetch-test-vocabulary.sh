#!/bin/sh
# Download the vocabulary of Qwen's tokenizers, with which tests check what the embedded tokenizer would hide. It lies in
# the package dashscope (Apache-2.0), which is not installed: only the file is read. Needs .venv (make setup).
set -eu
cd "$(dirname "$0")/.."
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest .venv/share/adfm-tests dashscope==2.0.2
