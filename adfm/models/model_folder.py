"""Facts about a model from the files of its folder, without loading it."""

import json
import math
from pathlib import Path
from typing import Any

from adfm import files
from adfm.errors import AdfmError
from adfm.models import families

DESCRIPTION = files.MODEL
DETECTOR = "detector"  # the `stage` in `adfm.json` of a reference detector (`adfm.models.detector`)


def describe(model: str | Path) -> dict[str, Any] | None:
    """Return the contents of `adfm.json` of a folder that adfm trained; `None` for any other model."""
    file = Path(model) / DESCRIPTION
    return dict(json.loads(file.read_text())) if file.is_file() else None


def is_detector(model: str | Path) -> bool:
    """Whether a model is the folder of a reference detector."""
    return (describe(model) or {}).get("stage") == DETECTOR


def grey_range(model: str | Path) -> tuple[int, int] | None:
    """Return the range of the grey values that a model was trained on, if they had more than 8 bits."""
    bounds = (describe(model) or {}).get("grey_range")
    return (bounds[0], bounds[1]) if bounds else None


def kinds_of(model: str | Path) -> tuple[str, ...]:
    """Return the kinds of defects that a model names one of; empty for a base model and one without kinds."""
    kinds = tuple((describe(model) or {}).get("kinds", ()))
    return kinds if len(kinds) > 1 else ()  # a detector of one kind has learned none


def config(folder: Path) -> dict[str, Any]:
    """Read a base model's `config.json`; raise `AdfmError` if it cannot be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdfmError(f"model.name: {folder}/config.json cannot be read ({error}); get it again") from error
    if not isinstance(content, dict):
        raise AdfmError(f"model.name: {folder}/config.json does not hold the settings of a model; get it again")
    return content


def family_of(folder: Path) -> str:
    """Return the family of a base model, a key of `families.FAMILIES`; raise `AdfmError` for an unknown one."""
    family = config(folder).get("model_type")
    try:
        families.get(family)
    except AdfmError as error:
        raise AdfmError(f"model.name: {folder}: {error}") from None
    return str(family)


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Read the shape of each weight in a base model's folder; raise `AdfmError` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:  # reads the heads of the files alone
            with safe_open(file, framework="np") as opened:
                shapes |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise AdfmError(
                f"model.name: {file} is not a safetensors file, or is incomplete ({error}); get it again"
            ) from error
    return shapes


def parameters(folder: Path) -> int:
    """Return how many numbers the weights in a base model's folder have."""
    return sum(map(math.prod, weight_shapes(folder).values()))
