"""Write a registered version as an MLflow pyfunc, which MLflow loads with `adfm.serving.scoring`."""

import base64
import io
import warnings
from pathlib import Path

from PIL import Image

import adfm
from adfm import tracking

_LOADER = "adfm.serving.scoring"
# Without these the loader cannot be imported where the model is served.
_NEEDED = (
    *("accelerate", "mlflow", "numpy", "pandas", "peft", "pillow", "pillow-heif", "pyarrow", "safetensors", "scipy"),
    *("tokenizers", "torch", "transformers"),
)
_REQUIREMENTS = """\
# These are not enough: adfm itself, of version {version}, is not on PyPI. Install it from its repository, and serve
# with `--env-manager local` from there. lineage.json says with which commit the model was made.
"""


def write(folder: Path, kinds: bool = False) -> None:
    """Write the parts of an MLflow pyfunc: `MLmodel`, input example, and lists of requirements.

    Args:
        folder: To make; the version has it beside `model/`, `evaluation/` and `params.yaml`.
        kinds: Whether the model names the kinds of defects.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of its own type hints and its own use of pandas
        import mlflow.pyfunc
        import pandas as pd
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, DataType, Schema
        from mlflow.types.schema import Array

        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "gray").save(buffer, "PNG")
        example = pd.DataFrame({"image": [base64.b64encode(buffer.getvalue()).decode()]})
        outputs = Schema(
            [
                ColSpec("string", "label", required=False),
                ColSpec("double", "probability", required=False),
                ColSpec("double", "threshold", required=False),
                ColSpec(Array(Array(DataType.double)), "boxes"),
                ColSpec("string", "reasoning"),
                ColSpec("string", "reason", required=False),
                *([ColSpec("string", "kind", required=False)] if kinds else []),
            ]
        )
        signature = ModelSignature(inputs=Schema([ColSpec("string", "image")]), outputs=outputs)
        installed = tracking.libraries()
        pins = [f"{name}=={installed[f'library.{name}']}" for name in _NEEDED if f"library.{name}" in installed]
        mlflow.pyfunc.save_model(
            folder, loader_module=_LOADER, signature=signature, input_example=example, pip_requirements=pins
        )
    file = folder / "requirements.txt"
    about = _REQUIREMENTS.format(version=adfm.__version__)
    file.write_text(about + file.read_text(encoding="utf-8"), encoding="utf-8")
