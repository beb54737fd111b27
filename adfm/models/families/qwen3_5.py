"""Qwen3.5, without thinking."""

from adfm.models.families import patches
from adfm.models.families.family import Family

# Qwen3.5's own template takes what stands in <think> out of an answer and writes it in another form, and begins an
# answer with <think> itself. Here an answer stands as it is, after the empty <think> of an answer without thinking.
_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role + '\\n' }}
{%- if message.role == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"""

# Coordinates: assumed to be those of Qwen3-VL; no real weights were at hand to try them.
FAMILY = Family("Qwen3.5, 3.6 and 3.8, dense", "Qwen3VLProcessor", "thousandths", ("visual",), patches, _TEMPLATE)
