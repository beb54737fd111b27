"""Qwen2.5-VL."""

from adfm.models.families import patches
from adfm.models.families.family import Family

# Coordinates: as Qwen's cookbook of spatial understanding has them.
FAMILY = Family("Qwen2.5-VL", "Qwen2_5_VLProcessor", "pixels", ("visual",), patches)
