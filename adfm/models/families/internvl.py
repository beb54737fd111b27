"""InternVL3 and 3.5."""

from adfm.models.families import tiles
from adfm.models.families.family import Family

# Coordinates: assumed to be those of Qwen3-VL; no real weights were at hand to try them.
FAMILY = Family(
    "InternVL3 and 3.5, the folders that end in -HF",
    "InternVLProcessor",
    "thousandths",
    ("vision_tower", "multi_modal_projector"),
    tiles,
    vllm=False,  # vLLM has the architecture; `vllm_engine` only computes the sizes of images cut into patches
)
