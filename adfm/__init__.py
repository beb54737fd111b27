"""adfm: adapt a vision-language model to finding defects in photographs of products.

The names in `__all__` are the public Python API (`adfm.api`); everything else may change without notice.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adfm.api import (
        approve,
        convert,
        evaluate,
        fetch,
        gate,
        load_params,
        predict,
        promote,
        register,
        rollback,
        sft,
        train,
        train_detector,
        validate,
    )
    from adfm.errors import AdfmError
    from adfm.params import Params

__all__ = [
    "AdfmError",
    "Params",
    "approve",
    "convert",
    "evaluate",
    "fetch",
    "gate",
    "load_params",
    "predict",
    "promote",
    "register",
    "rollback",
    "sft",
    "train",
    "train_detector",
    "validate",
]


# Imported at first use: the readers and metrics alone need neither torch nor MLflow.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from adfm import api, errors

    return errors.AdfmError if name == "AdfmError" else getattr(api, name)
