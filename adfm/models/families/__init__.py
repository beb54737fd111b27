"""Model families: a file each, and a line each in `FAMILIES`.

To add a family, write its file, add its line, and add a model of it with random weights to
`tests/models/random_models.py`, which `tests/training/test_families.py` takes along the whole path. If it cuts images
neither into `patches` nor into `tiles`, write a third module with the functions of `Images`.
"""

from typing import Any

from adfm.errors import AdfmError
from adfm.models.families import adfm_embedded, internvl, qwen2_5_vl, qwen3_5, qwen3_vl
from adfm.models.families.family import UNITS, Family

__all__ = ["FAMILIES", "UNITS", "Family", "get", "placeholders", "processor_class"]

FAMILIES = {  # by `model_type` of the model's configuration
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "qwen3_5": qwen3_5.FAMILY,
    "adfm_embedded": adfm_embedded.FAMILY,
    "internvl": internvl.FAMILY,
}


def get(model_type: Any) -> Family:
    """Return the family of a model by `model_type` of its configuration; raise `AdfmError` for an unknown one."""
    if model_type not in FAMILIES:
        known = "; ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
        raise AdfmError(
            f"a {model_type!r} model is of a family that adfm does not know; it knows: {known}. Take a model of one of "
            "these, or add a family and a test of it, as adfm/models/families/__init__.py says"
        )
    return FAMILIES[model_type]


def processor_class(model_type: str) -> Any:
    """Return a family's processor class without its video half, which alone needs torchvision."""
    import transformers

    original: Any = getattr(transformers, get(model_type).processor)
    # ProcessorMixin loads, keeps and saves the parts that get_attributes names, and ignores a further one.
    attributes = [part for part in original.get_attributes() if part != "video_processor"]
    # Under the original's name, so that what it saves loads in any transformers.
    return type(original.__name__, (original,), {"get_attributes": classmethod(lambda cls: list(attributes))})


def placeholders(processor: Any) -> list[int]:
    """Return the tokens that stand for images and videos, which must never be generated."""
    video = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
    return [token for token in [*processor.image_token_ids, video] if token is not None]
