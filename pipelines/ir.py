"""Compile a pipeline to its intermediate representation (IR), the YAML file that a cluster runs."""

from pathlib import Path
from typing import Any


def write(pipeline: Any, file: Path) -> None:
    """Compile a pipeline to IR; the same code and images give the same bytes."""
    from kfp import compiler

    file.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(file))
