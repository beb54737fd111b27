"""Supervised fine-tuning (cold start): an adapter learns the form of the completions, and to name defects."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from adfm import tracking
from adfm.data import hashes
from adfm.data import shards as shards_
from adfm.files import atomic_folder, refuse_to_replace, write_json
from adfm.method import kinds as kinds_
from adfm.method import prompt
from adfm.models import adapters, decoding, families, loading, model_folder
from adfm.params import Params, Sft
from adfm.records import Box
from adfm.training import examples
from adfm.training.augmentation import VIEWS, view, view_of_box
from adfm.training.outbox import Outbox

_MOST_BOXES = 8  # a completion of more would be cut at evaluate.max_new_tokens, and then have no letter
_MOST_VALIDATION = 400  # images that the loss after an epoch is computed on


def sft(shards: Path, out: Path, params: Params, force: bool = False) -> None:
    """Train a new adapter on target completions, and write it with its processor to `out`.

    A target completion in stages names the defects' boxes. Where some anomalous images have boxes, those without are
    left out; where none has, the completion names no place.

    Args:
        shards: Folder of shards; the train split is used, and the validation split to stop early.
        out: Folder to write: adapter, processor, `adfm.json`, `trained_on.parquet`, `sft_curves.csv`.
        params: Reads `model`, `lora`, `tile`, `sft` and `seed`.
        force: Replace a finished model at `out`.

    Raises:
        AdfmError: `out` cannot be replaced; or model, shards, tracking store or `lora.target_modules` cannot be used.
    """
    refuse_to_replace(out, force)
    from transformers import set_seed

    from adfm.training.figures import write_curves

    set_seed(params.seed)
    settings = params.sft
    loaded = loading.load(params.model.name, params.model)
    kinds = kinds_.listed(shards_.table(shards, "train")["defect"].to_pylist()) if settings.kinds else ()
    messages = prompt.messages(families.get(loaded.family).units, settings.stages, kinds)
    loaded = replace(loaded, prompt=messages, kinds=kinds)
    decoding.Scorer(loaded.processor.tokenizer)  # refuses a tokenizer whose answers evaluation could not score
    model = adapters.attach(loaded.model, params.lora)
    with (
        atomic_folder(out) as folder,
        tracking.start_run("sft", params, {"attention": model.config._attn_implementation}, must_end=False) as run,
        Outbox(out.with_name(out.name + ".unsent"), run.info.run_id) as outbox,
    ):
        history: list[dict[str, Any]] = []
        cut = None
        if settings.steps:  # 0: an adapter that changes nothing, from which the paper starts GRPO
            history, cut = _trained(model, loaded, shards, folder / "cache", params, outbox)
        save(folder, model, loaded, shards, params, "sft", run.info.run_id, cut=cut)
        write_curves(history, folder / "sft_curves.csv")


def _trained(
    model: Any, loaded: loading.Loaded, shards: Path, work: Path, params: Params, outbox: Outbox
) -> tuple[list[dict[str, Any]], int | None]:
    """Train `model`; return what was logged, and the steps if `sft.steps` ended it too early."""
    import torch
    from transformers import EarlyStoppingCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig

    from adfm.training.callbacks import MetricsCallback

    settings = params.sft
    epoch = -(-len(examples.rows(shards, "train", params.tile)) // settings.batch_size)
    steps = min(settings.steps, epoch * settings.epochs)
    # Without boxes, an anomalous image beside others with boxes would teach to name no place.
    located = settings.stages and _some_have_boxes(shards)
    draw = partial(examples.draw, shards, loaded, cache=work, located=located, tile=params.tile)
    share = settings.anomalous_share
    data = draw(steps * settings.batch_size, share, params.seed)
    count = _validation_images(shards, settings, set(data["label"])) if steps > epoch else 0
    kinds = loaded.kinds or kinds_.single(shards_.table(shards, "train")["defect"].to_pylist())[: kinds_.MOST]
    validation, stops = None, dict[str, Any](save_strategy="no")
    if count:
        validation = draw(count, share, params.seed, split="validation")
        stops = {  # the checkpoints serve to load the best epoch at the end
            "eval_strategy": "steps",
            "eval_steps": epoch,
            "per_device_eval_batch_size": settings.batch_size,
            "save_strategy": "steps",
            "save_steps": epoch,
            "save_total_limit": 1,
            "save_only_model": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
        }
    trainer = _trainer_class()(
        model=model,
        args=SFTConfig(
            output_dir=str(work),
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps // 4),
            train_sampling_strategy="sequential",  # the draw has spread the labels evenly over the batches
            remove_unused_columns=False,  # those of the loss on places
            max_length=None,  # TRL's default would cut image tokens off
            completion_only_loss=True,
            logging_steps=1,
            **stops,
            report_to="none",  # MetricsCallback reports, and has a bar
            disable_tqdm=True,
            seed=params.seed,
            bf16=params.model.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            activation_checkpointing=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=data,
        eval_dataset=validation,
        processing_class=loaded.processor,
        callbacks=[MetricsCallback("cold start", ["loss", "mean_token_accuracy"], outbox)],
    )
    trainer.places_weight = settings.places_weight
    trainer.train_dataset = Targets(data, settings, params.seed, settings.augment, kinds)  # TRL takes a Dataset only
    if count:
        trainer.eval_dataset = Targets(validation, settings, params.seed, False, kinds)
        trainer.add_callback(EarlyStoppingCallback(settings.patience))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    limit = "sft.steps" if steps == settings.steps else "sft.epochs"
    if steps <= epoch:
        early = "it has made no more than one pass over the images"
    elif count and trainer.state.best_global_step == steps:
        early = "its loss on validation was still falling"
    else:
        return list(trainer.state.log_history), None
    print(f"cold start: after {steps} steps, which {limit} allows, {early}; raise {limit} if the model is too weak")
    return list(trainer.state.log_history), steps if limit == "sft.steps" else None


def _validation_images(shards: Path, settings: Sft, needed: set[str]) -> int:
    """Return how many images of the validation split are scored after an epoch; 0: training cannot stop early."""
    if not settings.patience:
        return 0
    exists = any(shards.glob("validation-*.parquet"))
    labels = shards_.table(shards, "validation")["label"].to_pylist() if exists else []
    if missing := " and no ".join(sorted(needed - {*labels})):
        print(f"cold start: the validation split has no {missing} image, so that it takes all its steps")
        return 0
    return min(len(labels), _MOST_VALIDATION)


def _some_have_boxes(shards: Path) -> bool:
    """Whether anomalous images have boxes; prints how many have none."""
    with_boxes, without = examples.boxes_known(shards)
    if without and with_boxes:
        print(f"cold start: {without} anomalous training images have no boxes and are left out")
    elif without:
        print("cold start: no anomalous training image has boxes; the model learns the verdict, and no place")
    return bool(with_boxes)


class Targets:
    """Images with their target completions, as TRL reads them: `prompt`, `completion`, `image`.

    For the loss on places there are also `boxes`, as fractions of width and height, `None` where the place is not
    known; `defective`; and `kind`, the number of its kind in `kinds`, `None` where it has none of them, or several.

    Args:
        data: As `examples.draw` returns it.
        settings: Decides the form of the completions.
        seed: Decides which view of an image (`adfm.training.augmentation`) a row shows.
        augment: `False`: the image as it is.
        kinds: Those of the training images.
    """

    def __init__(self, data: Any, settings: Sft, seed: int, augment: bool = True, kinds: Sequence[str] = ()) -> None:
        self._data, self._settings, self._seed, self._augment, self._kinds = data, settings, seed, augment, kinds

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row."""
        row = self._data[index]
        number = int(np.random.default_rng([self._seed, index]).integers(VIEWS)) if self._augment else 0
        width, height = row["frame"]
        regions = [view_of_box(Box(*box), number, width, height) for box in row["regions"]]
        largest = sorted(regions, key=lambda box: -box.area)[:_MOST_BOXES]
        ordered = sorted(largest, key=lambda box: (box.y1, box.x1))
        form = self._settings
        kinds = self._kinds if form.kinds else ()
        text = prompt.target_completion(row["label"], ordered, row["defect"], form.coordinate_step, form.stages, kinds)
        defective, kind = row["label"] == "anomalous", kinds_.of(row["defect"], self._kinds)
        return {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": text}],
            "image": view(row["image"].convert("RGB"), number, [self._seed]),
            "boxes": [[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in regions]
            if regions or not defective
            else None,
            "defective": defective,
            "kind": self._kinds.index(kind) if defective and kind in self._kinds else None,
        }


def _trainer_class() -> type[Any]:
    from trl import SFTTrainer

    from adfm.tiny import tower

    class Trainer(SFTTrainer):
        """TRL's trainer with a second loss, on the places that the embedded model's tower predicts."""

        places_weight = 0.0

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._places: list[Any] = []
            network: Any = self.model
            for module in network.modules():
                if isinstance(module, tower.Tower):
                    module.register_forward_hook(lambda module, inputs, output: self._places.append(output.places))
            collate = self.data_collator
            self.data_collator = lambda rows: {
                **collate([{k: row[k] for k in ("prompt", "completion", "image")} for row in rows]),
                "boxes": [row["boxes"] for row in rows],
                "defective": [row["defective"] for row in rows],
                "kinds": [row["kind"] for row in rows],
            }

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            truth = [inputs.pop(name) for name in ("boxes", "defective", "kinds")]
            self._places.clear()
            compute_loss: Any = super().compute_loss  # untyped in TRL
            loss = compute_loss(model, inputs, *args, **kwargs)
            if self._places and self.places_weight:
                places = tower.loss(self._places[-1], *truth)  # of the forward pass above
                self._metrics["train" if model.training else "eval"]["places_loss"].append(places.item())
                loss = loss + self.places_weight * places
            return loss

    return Trainer


def save(
    folder: Path,
    model: Any,
    loaded: loading.Loaded,
    shards: Path,
    params: Params,
    stage: str,
    run_id: str,
    weights: dict[str, Any] | None = None,
    start: Path | None = None,
    cut: int | None = None,
) -> None:
    """Write adapter, processor, `adfm.json` and `trained_on.parquet`, and remove what else the training left there.

    `weights` are those of a model of which each process holds a part, `start` is the folder that it was trained from,
    and `cut` the steps of a cold start that `sft.steps` ended too early, by default those of `start`.
    """
    if start is not None:
        cut = (model_folder.describe(start) or {}).get("cut_short")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    # Without the adapter `ref`, which TRL adds for the KL, and without embeddings: they are the base's, and PEFT would
    # add them to an adapter on `lm_head` or `embed_tokens`.
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=weights, save_embedding_layers=False)
    loaded.processor.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card
    description = {
        "stage": stage,
        "base": {"name": loaded.base.name, "revision": loaded.base.revision},
        "family": loaded.family,
        "prompt": loaded.prompt,
        **({"kinds": list(loaded.kinds)} if loaded.kinds else {}),
        **({"cut_short": cut} if cut else {}),
        "mlflow_run_id": run_id,
        "data_fingerprint": shards_.fingerprint(shards),
        "grey_range": shards_.grey_range(shards),
        "params": params.model_dump(mode="json", by_alias=True),
    }
    write_json(description, folder / model_folder.DESCRIPTION)
    if (images := trained_on(shards, start)) is not None:
        hashes.write(images, folder / hashes.FILE)


def trained_on(shards: Path, start: Path | None = None) -> pa.Table | None:
    """Return the hashes of all images that a model trained on `shards` has seen, from `start` or a base model.

    Returns:
        As `hashes.collect`; `None` if `start`, by an earlier adfm, does not say what it was trained on.

    Raises:
        AdfmError: Shards or the table of `start` cannot be read.
    """
    if start is None:  # what a base model has seen is not known
        return hashes.collect(shards, hashes.SEEN)
    before = hashes.of_model(start)
    if before is None or (model_folder.describe(start) or {}).get("data_fingerprint") == shards_.fingerprint(shards):
        return before
    return hashes.unite([before, hashes.collect(shards, hashes.SEEN)])
