"""Extras of the package: which one to install where a module is missing."""

from importlib.util import find_spec

# Modules that adfm imports and the core does not bring; tests/test_extras.py compares them with pyproject.toml.
EXTRAS = {
    "data": {"aiohttp", "asyncssh", "boto3", "botocore", "dvc", "great_expectations"},
    "pipelines": {"docker", "kfp", "kubernetes", "urllib3"},
    "registry": {"mlflow", "model_signing", "requests", "uvicorn"},
    "train": {
        *("accelerate", "datasets", "httpx2", "huggingface_hub"),
        *("peft", "safetensors", "torch", "transformers", "trl"),
    },
}


def missing(error: ModuleNotFoundError) -> str | None:
    """Return the message that names the extra to install; `None` where no extra brings what is missing."""
    module = (error.name or "").partition(".")[0]
    extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
    if extra is None or find_spec(module) is not None:  # the second: a part of an installed package is missing
        return None
    return f'this needs {module}, which is not installed: pip install "adfm[{extra}]", or "adfm[all]" for every verb.'
