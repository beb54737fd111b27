"""Images per second of an evaluation against one `generate` an image, same model, same images, in one run.

python benchmarks/evaluate.py            # the embedded model on the embedded data set
python benchmarks/evaluate.py MODEL SHARDS

Prints both rates, their ratio, and how many answers differ. Ends with status 1 if the ratio is below 4 or an answer
differs.
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from transformers.utils import logging

from adfm.data import shards as shards_
from adfm.data import synthetic
from adfm.data.conversion import convert
from adfm.evaluation import predictions
from adfm.models import decoding, families, loading
from adfm.params import Params

MODEL = "embedded://tiny-base"
LEAST = 4.0
ALONE = 48  # images that are answered one by one: enough for a rate, at the pace of one by one


def one_by_one(model: str, shards: Path, params: Params) -> tuple[dict[str, str], float]:
    """Answers of the first images by id, and images per second: a loop as one would write it first."""
    loaded = loading.load(model, params.model)
    text = loading.chat_text(loaded.processor, loaded.prompt)
    tokenizer = loaded.processor.tokenizer
    answers = {}
    start = time.perf_counter()
    for record, _ in zip(shards_.read(shards, "test"), range(ALONE), strict=False):
        image = Image.open(io.BytesIO(record.image)).convert("RGB")
        inputs = loaded.processor(text=[text], images=[image], return_tensors="pt").to(loaded.model.device)
        with torch.inference_mode():
            output = loaded.model.generate(
                **inputs,
                max_new_tokens=params.evaluate.max_new_tokens,
                do_sample=False,
                suppress_tokens=families.placeholders(loaded.processor),
                stop_strings=[decoding.STOP],
                tokenizer=tokenizer,
            )
        written = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[record.id] = decoding.until_stop(written)
    return answers, len(answers) / (time.perf_counter() - start)


def main(model: str, shards: Path) -> int:
    """Measures both and prints what was found."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    params = Params()
    alone, slow = one_by_one(model, shards, params)
    start = time.perf_counter()
    table = predictions.predict(model, shards, params, "batched")  # loading included
    fast = len(table) / (time.perf_counter() - start)
    together = dict(zip(table["id"], table["completion"], strict=True))
    differing = [name for name, answer in alone.items() if together[name] != answer]
    print(f"{len(table)} images, {torch.get_num_threads()} threads, batches of {params.evaluate.batch_size}")
    print(f"one by one  {slow:7.1f} images/s ({len(alone)} images)")
    print(f"evaluation  {fast:7.1f} images/s, loading of the model included")
    print(f"ratio       {fast / slow:7.1f}")
    print(f"answers that differ: {len(differing)} of {len(alone)}")
    return 0 if fast >= LEAST * slow and not differing else 1


if __name__ == "__main__":
    if len(sys.argv) == 3:
        raise SystemExit(main(sys.argv[1], Path(sys.argv[2])))
    with TemporaryDirectory() as folder:
        synthetic.generate(Path(folder) / "raw")
        convert(Path(folder) / "raw", Path(folder) / "shards", Params())
        raise SystemExit(main(MODEL, Path(folder) / "shards"))
