"""Qwen3-VL."""

from adfm.models.families import patches
from adfm.models.families.family import Family

# Coordinates: as Qwen's cookbook of spatial understanding has them.
FAMILY = Family("Qwen3-VL", "Qwen3VLProcessor", "thousandths", ("visual",), patches)
