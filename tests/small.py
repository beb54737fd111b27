"""The smallest settings that make sense for the whole path."""

SMALL = [
    "fetch.source=synthetic://?images=20",
    "validation.min_images_per_split=2",
    "validation.min_label_share=0",
    "model.max_pixels=9216",
    "sft.steps=2",
    "sft.batch_size=2",
    "detector.steps=2",
    "train.steps=2",
    "train.prompts_per_step=2",
    "train.num_generations=2",
    "train.max_completion_length=48",
    "train.checkpoint_every=1",
    "train.pictures_every=1",
    "evaluate.max_new_tokens=48",
    "evaluate.bootstrap=50",
]

# What a model of two steps on 20 images fulfils.
SMALL_POLICY = """\
rule: noninferior
whole:
  accuracy: {limit: null, margin: 0.9}
  iou: {limit: null, margin: 0.9}
  escape_rate: {limit: null, margin: 0.9}
  overkill: {limit: null, margin: 0.9}
"""
