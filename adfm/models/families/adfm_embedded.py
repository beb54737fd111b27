"""The embedded model: Qwen3-VL's classes with the vision tower of `adfm.tiny.tower`."""

from adfm.models.families import patches
from adfm.models.families.family import Family

FAMILY = Family(
    "the embedded model",
    "Qwen3VLProcessor",
    "thousandths",
    ("visual",),
    patches,
    # Convolutions, which take no low-rank change, and embeddings, to which the names of a user's defects are new.
    modules_to_save=("visual", "embed_tokens", "lm_head"),
    vllm=False,
)
