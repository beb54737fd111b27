"""GRPO on TRL: train the adapter of a cold start, with checkpoints that an interrupted training resumes from."""

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from adfm import tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.files import atomic_folder, digest, refuse_to_replace, replace_json
from adfm.models import hardware, liger, loading, model_folder
from adfm.params import Params
from adfm.process import stopping
from adfm.training import checkpoints, examples, memory
from adfm.training.outbox import Outbox
from adfm.training.sft import save

IDENTITY = "identity.json"


def train(shards: Path, model: Path, out: Path, params: Params, keep: Path | None = None, force: bool = False) -> None:
    """Continue training the adapter `model` by GRPO, and write it with its processor to `out`.

    Checkpoints are in `<out>.checkpoint/`. An interrupted training resumes from the last of them, if data, model and
    settings are the same; else it starts over. Metrics that MLflow does not have yet are in `<out>.unsent/`.

    Started in several processes (`adfm.training.launch`), it divides the completions of a step among them; the first
    process alone writes and calls MLflow.

    Args:
        shards: Folder of shards; the train split is used.
        model: Folder that cold start wrote.
        out: Folder to write: adapter, processor, `adfm.json`, `trained_on.parquet`, `reward_curves.csv` and `.png`.
        params: Reads `model`, `train` and `seed`.
        keep: Folder for the model of every checkpoint, a folder a step.
        force: Replace a finished model at `out`.

    Raises:
        AdfmError: `out` holds a finished model or something else; model, shards or tracking store cannot be used, the
            batch does not divide, the machine lacks what settings ask for, memory runs out, a health check fails, or
            (`Stopped`) SIGTERM has come.
    """
    refuse_to_replace(out, force)
    settings = params.train
    hardware.require(params, int(os.environ.get("WORLD_SIZE", "1")))
    if model_folder.describe(model) is None:
        raise AdfmError(f"{model} is not a folder that `adfm sft` wrote; run that first (sft.steps may be 0)")
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from adfm.training.figures import draw_curves, write_curves
    from adfm.training.health import StopCallback
    from adfm.training.trainer import GrpoTrainer

    set_seed(params.seed)
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.is_main_process:
        for warning in hardware.memory_warnings(params, state.num_processes):
            print(f"warning: {warning}")
    work = out.with_name(out.name + ".checkpoint")
    run_id = _resume(work, shards, model, params) if state.is_main_process else None
    loaded = loading.load(model, params.model, trainable=True)
    if fused := liger.enabled(settings, loaded.family):
        liger.apply(loaded.model)
    outbox = None
    with contextlib.ExitStack() as stack:
        terminated = stack.enter_context(stopping.defer_sigterm("training stops after this step, with a checkpoint"))
        stop = StopCallback(settings.health, terminated)
        # The launcher of several processes ends all when one has ended: they wait until the first has reported.
        stack.callback(lambda: stop.stopped and state.wait_for_everyone())
        if state.is_main_process:
            folder = stack.enter_context(atomic_folder(out))
            tags = {"attention": loaded.model.config._attn_implementation, "liger": str(fused).lower()}
            run = stack.enter_context(tracking.start_run("train", params, tags, run_id=run_id, must_end=False))
            outbox = stack.enter_context(Outbox(out.with_name(out.name + ".unsent"), run.info.run_id))
            _identify(work, shards, model, params, run.info.run_id)
        count = settings.steps * settings.prompts_per_step
        with state.main_process_first():  # the others read what it has cached
            start = checkpoints.last(work)
            draw = functools.partial(
                examples.draw,
                shards,
                loaded,
                anomalous_share=settings.anomalous_share,
                cache=work / "cache",
                weights=_uncertainty(model, shards, params, work) if settings.uncertainty_sampling else None,
                tile=params.tile,
            )
            data = draw(count=count, seed=params.seed + 1)  # another order than that of the cold start
            rounds = settings.dynamic_sampling
            reserve = draw(count=count * rounds, seed=params.seed + 2) if rounds else None
        trainer = GrpoTrainer(loaded, data, reserve, work, params, state.num_processes, bool(keep), outbox, stop)
        with memory.translate_errors(params, state.num_processes):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        if stop.stopped:
            raise stop.error(work, trainer.state.global_step, settings.steps, state.is_main_process)
        # All processes gather the weights of a divided model, which the first writes.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
        if outbox:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            save(folder, trained, loaded, shards, params, "train", run.info.run_id, weights, model)
            write_curves(trainer.state.log_history, folder / "reward_curves.csv")
            draw_curves(trainer.state.log_history, folder / "reward_curves.png")
            with Image.open(folder / "reward_curves.png") as chart:
                outbox.add_picture(chart, "curves/reward_curves.png")
            if keep:
                _keep(work, folder, keep)
        state.wait_for_everyone()
    if state.is_main_process:
        _clear(work)


def _keep(work: Path, trained: Path, keep: Path) -> None:
    """Write a model of every checkpoint: `trained`, with the checkpoint's adapter."""
    for checkpoint in work.glob("checkpoint-*"):
        model = keep / checkpoint.name.removeprefix("checkpoint-")
        shutil.copytree(trained, model, ignore=shutil.ignore_patterns("*.csv", "*.png"), dirs_exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(checkpoint / file, model / file)


def _uncertainty(model: Path, shards: Path, params: Params, work: Path) -> dict[str, float]:
    """Return how unsure the model is of the letter of each training image: 1 at even odds, 0 when it is certain."""
    from adfm.evaluation.predictions import predict_splits

    # vLLM would claim the memory of the GPU that holds the model in training, which is already loaded.
    evaluate = params.evaluate.model_copy(update={"backend": "transformers"})
    params = params.model_copy(update={"evaluate": evaluate})
    table = predict_splits(model, shards, params, "scoring uncertainty", ["train"], work / "answers")["train"]
    odds = table["score"].fillna(0.5)
    return dict(zip(table["id"], (4 * odds * (1 - odds)).tolist(), strict=True))


def _identity(shards: Path, model: Path, params: Params) -> dict[str, Any]:
    """Return what must be the same for a training to resume from a checkpoint."""
    sections = params.model_dump(mode="json", by_alias=True, include={"seed", "model", "tile", "train"})
    for may_change in ("checkpoint_every", "pictures_every", "health", "vllm", "vllm_server"):
        sections["train"].pop(may_change)
    return {"data": shards_.fingerprint(shards, "train"), "model": digest(model), **sections}


def _resume(work: Path, shards: Path, model: Path, params: Params) -> str | None:
    """Return the MLflow run to resume; set checkpoints of other data, model or settings aside."""
    file = work / IDENTITY
    if not file.is_file():
        shutil.rmtree(work, ignore_errors=True)
        return None
    saved, identity = json.loads(file.read_text()), _identity(shards, model, params)
    if saved["identity"] != identity:
        aside = work.with_name(work.name.removesuffix(".checkpoint") + ".old.checkpoint")
        changed = ", ".join(checkpoints.differences(saved["identity"], identity))
        print(f"{work}: the checkpoints are of other data, model or settings: {changed}; they are set aside in {aside}")
        print("starting over")
        if aside.exists():
            _clear(aside)
        work.rename(aside)  # with the former settings, and renamed back, it can be resumed
        return None
    from adfm.training.health import refuse_diverged

    refuse_diverged(work, params.train.health)
    return str(saved["mlflow_run_id"])


def _identify(work: Path, shards: Path, model: Path, params: Params, run_id: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    replace_json({"identity": _identity(shards, model, params), "mlflow_run_id": run_id}, work / IDENTITY)


def _clear(work: Path) -> None:
    (work / IDENTITY).unlink()  # first: what is left if the process is killed here is not resumed from
    shutil.rmtree(work)
