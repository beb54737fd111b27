"""Supervised cold start: a LoRA adapter that has seen the form of the answer on the images of the line.

`warmup.steps: 0` writes an adapter that changes nothing, and GRPO starts from the base: the paper's setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adfm import tracking
from adfm.data import hashes
from adfm.data import shards as shards_
from adfm.files import atomic_folder, refuse_to_replace, write_json
from adfm.method import kinds as kinds_
from adfm.method import prompt
from adfm.models import adapters, decoding, families, loading
from adfm.outbox import Outbox
from adfm.params import Params, Warmup
from adfm.records import Box
from adfm.training import examples

if TYPE_CHECKING:
    import pyarrow as pa


def warmup(shards: Path, out: Path, params: Params, force: bool = False) -> None:
    """Train a new adapter on correct answers, and write it with its processor to `out`.

    The correct answer in stages names the defects' boxes. Anomalous images without boxes are left out, as a made-up
    place would be learnt; where no other is anomalous, the adapter changes nothing, as with `warmup.steps: 0`.

    Args:
        shards: Folder of shards; the train split is used.
        out: Folder to write: adapter, processor, `adfm.json`, `trained_on.parquet`, `warmup_curves.csv`.
        params: Reads `model`, `lora`, `warmup` and `seed`.
        force: Replace a finished model at `out`.

    Raises:
        AdfmError: `out` holds a finished model or something else; model, shards or tracking store cannot be used, or
            `lora.target_modules` does not fit the model.
    """
    refuse_to_replace(out, force)
    import torch
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    from adfm.training.watch import Watch, write_curves

    set_seed(params.seed)
    settings = params.warmup
    loaded = loading.load(params.model.name, params.model)
    kinds = kinds_.listed(shards_.table(shards, "train")["defect"].to_pylist()) if settings.kinds else ()
    messages = prompt.messages(families.get(loaded.family).units, settings.stages, kinds)
    loaded = replace(loaded, prompt=messages, kinds=kinds)
    decoding.Scorer(loaded.processor.tokenizer)  # refuses a tokenizer whose answers evaluation could not score
    model = adapters.attach(loaded.model, params.lora)
    steps = _steps(shards, settings)
    with (
        atomic_folder(out) as folder,
        tracking.start_run("warmup", params, {"attention": model.config._attn_implementation}, must_end=False) as run,
        Outbox(out.with_name(out.name + ".unsent"), run.info.run_id) as outbox,
    ):
        history: list[dict[str, Any]] = []
        if steps:
            count, share = steps * settings.batch_size, settings.anomalous_share
            data = examples.draw(
                shards, loaded, count, share, params.seed, folder / "cache", located=settings.stages, tile=params.tile
            )
            trainer = SFTTrainer(
                model=model,
                args=SFTConfig(
                    output_dir=str(folder / "cache"),
                    max_steps=steps,
                    per_device_train_batch_size=settings.batch_size,
                    learning_rate=settings.learning_rate,
                    lr_scheduler_type="cosine",
                    warmup_steps=min(10, steps // 4),
                    max_length=None,
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    seed=params.seed,
                    bf16=params.model.dtype == "bfloat16",
                    use_cpu=not torch.cuda.is_available(),
                    activation_checkpointing=False,
                    dataloader_pin_memory=torch.cuda.is_available(),
                ),
                train_dataset=data.map(
                    _answer,
                    fn_kwargs={"step": settings.coordinate_step, "stages": settings.stages, "kinds": kinds},
                    remove_columns=["label", "defect", "regions", "frame"],
                ),
                processing_class=loaded.processor,
                callbacks=[Watch("warm-up", ["loss", "mean_token_accuracy"], outbox)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            trainer.train()
            history = trainer.state.log_history
        save(folder, model, loaded, shards, params, "warmup", run.info.run_id)
        write_curves(history, folder / "warmup_curves.csv")


def _steps(shards: Path, settings: Warmup) -> int:
    """The steps to take; says which images are left out."""
    if not settings.steps or not settings.stages:
        return settings.steps
    with_boxes, without = examples.boxes_known(shards)
    if without:
        print(f"cold start: {without} anomalous training images have no boxes and are left out")
    if without and not with_boxes:
        print("cold start: no anomalous image has boxes, so that no step is taken; GRPO starts from the base model")
        return 0
    return settings.steps


def _answer(row: dict[str, Any], step: int, stages: bool, kinds: Sequence[str]) -> dict[str, Any]:
    text = prompt.answer(row["label"], [Box(*box) for box in row["regions"]], row["defect"], step, stages, kinds)
    return {"completion": [{"role": "assistant", "content": text}]}


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
) -> None:
    """Write adapter, processor, `adfm.json` and `trained_on.parquet`, and remove what else the training left there.

    `weights` are those of a model of which each process holds a part, `start` is the folder that it was trained from.
    """
    import shutil

    shutil.rmtree(folder / "cache", ignore_errors=True)
    # The embeddings are the base's; PEFT would add them to an adapter on `lm_head` or `embed_tokens`.
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=weights, save_embedding_layers=False)
    loaded.processor.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    description = {
        "stage": stage,
        "base": {"name": loaded.base.name, "revision": loaded.base.revision},
        "family": loaded.family,
        "prompt": loaded.prompt,
        **({"kinds": list(loaded.kinds)} if loaded.kinds else {}),
        "mlflow_run_id": run_id,
        "data_fingerprint": shards_.fingerprint(shards),
        "grey_range": shards_.grey_range(shards),
        "params": params.model_dump(mode="json", by_alias=True),
    }
    write_json(description, folder / loading.DESCRIPTION)
    seen = trained_on(shards, start)
    if seen is not None:
        hashes.write(seen, folder / hashes.FILE)


def trained_on(shards: Path, start: Path | None = None) -> pa.Table | None:
    """Hashes of all images that a model has seen.

    Args:
        shards: Folder of the shards that it is trained on.
        start: The model's folder that the training starts from; `None` for a base model, whose data nobody knows.

    Returns:
        As `hashes.collect` gives them; `None` if `start`, by an earlier adfm, does not say what it was trained on.

    Raises:
        AdfmError: Shards or the table of `start` cannot be read.
    """
    if start is None:
        return hashes.collect(shards, hashes.SEEN)
    before = hashes.of_model(start)
    if before is None or (loading.describe(start) or {}).get("data_fingerprint") == shards_.fingerprint(shards):
        return before
    return hashes.unite([before, hashes.collect(shards, hashes.SEEN)])
