"""GRPO on TRL, with the three terms of the reward, and the figures that show whether a group taught anything.

Group-relative advantages need groups whose completions earn different rewards. *Utilisation* is the share of groups of
a step whose total rewards are not all equal (compared exactly, over the whole group).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from adfm import tracking
from adfm.data import shards as shards_
from adfm.errors import AdfmError
from adfm.files import atomic_folder, digest, refuse_to_replace, replace_json
from adfm.method import kinds as kinds_
from adfm.method import response, rewards
from adfm.method import terms as terms_
from adfm.method.coordinates import Frame
from adfm.models import families, hardware, liger, loading, model_folder
from adfm.params import Params
from adfm.process import stopping
from adfm.records import Label
from adfm.training import checkpoints, examples, health, images, memory
from adfm.training.outbox import Outbox
from adfm.training.sft import save

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

    from adfm.training.guard import Guard

TERMS = rewards.Terms._fields
KIND = "kind"
"""A further term, only of a model whose prompt asks for the defect's kind."""
IDENTITY = "identity.json"


def train(shards: Path, model: Path, out: Path, params: Params, keep: Path | None = None, force: bool = False) -> None:
    """Go on training the adapter `model` by GRPO, and write it with its processor to `out`.

    Checkpoints lie in `<out>.checkpoint/`. A training that was interrupted goes on from the last of them, if data,
    model and settings are the same; else it starts anew. What MLflow has not taken yet lies in `<out>.unsent/`.

    Started in several processes (`adfm.training.launch`), it divides the completions of a step among them; the first
    process alone writes and talks to MLflow.

    Args:
        shards: Folder of shards; the train split is used.
        model: Folder that cold start wrote.
        out: Folder to write: adapter, processor, `adfm.json`, `trained_on.parquet`, `reward_curves.csv` and `.png`.
        params: Reads `model`, `train` and `seed`.
        keep: Folder for the model of every checkpoint, a folder a step, to see how it came to be.
        force: Replace a finished model at `out`.

    Raises:
        AdfmError: `out` holds a finished model or something else; model, shards or tracking store cannot be used, the
            batch does not divide, the machine lacks what settings ask for, memory runs out, the figures are those of a
            training that has gone wrong, or (`Stopped`) SIGTERM has come.
    """
    refuse_to_replace(out, force)
    settings = params.train
    hardware.require(params, int(os.environ.get("WORLD_SIZE", "1")))
    if model_folder.describe(model) is None:
        raise AdfmError(f"{model} is not a folder that `adfm sft` wrote; run that first (sft.steps may be 0)")
    import torch
    from accelerate import PartialState
    from transformers import set_seed

    from adfm.training.guard import Guard
    from adfm.training.watch import draw_curves, write_curves

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
    with contextlib.ExitStack() as written:
        told = written.enter_context(stopping.noticed("training stops after this step, with a checkpoint"))
        guard = Guard(settings.health, told)
        # The launcher of several processes ends all when one has ended: they wait for the first to say its last word.
        written.callback(lambda: guard.stopped and state.wait_for_everyone())
        if state.is_main_process:
            folder = written.enter_context(atomic_folder(out))
            tags = {"attention": loaded.model.config._attn_implementation, "liger": str(fused).lower()}
            run = written.enter_context(tracking.start_run("train", params, tags, run_id=run_id, must_end=False))
            outbox = written.enter_context(Outbox(out.with_name(out.name + ".unsent"), run.info.run_id))
            _identify(work, shards, model, params, run.info.run_id)
        count = settings.steps * settings.prompts_per_step
        with state.main_process_first():
            start = checkpoints.last(work)
            doubt = _doubt(model, shards, params, work) if settings.uncertainty_sampling else None
            draw = functools.partial(
                examples.draw,
                shards,
                loaded,
                anomalous_share=settings.anomalous_share,
                cache=work / "cache",
                weights=doubt,
                tile=params.tile,
            )
            data = draw(count=count, seed=params.seed + 1)
            rounds = settings.dynamic_sampling
            reserve = draw(count=count * rounds, seed=params.seed + 2) if rounds else None
        trainer = _trainer(loaded, data, reserve, work, params, state.num_processes, bool(keep), outbox, guard)
        with memory.explained(params, state.num_processes):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        if guard.stopped:
            raise guard.error(work, trainer.state.global_step, settings.steps, state.is_main_process)
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
        if state.is_main_process:
            trained = trainer.accelerator.unwrap_model(trainer.model)
            save(folder, trained, loaded, shards, params, "train", run.info.run_id, weights, model)
            write_curves(trainer.state.log_history, folder / "reward_curves.csv")
            draw_curves(folder / "reward_curves.csv", folder / "reward_curves.png")
            if outbox:
                with Image.open(folder / "reward_curves.png") as chart:
                    outbox.add_picture(chart, "curves/reward_curves.png")
            if keep:
                _keep(work, folder, keep)
        state.wait_for_everyone()
    if state.is_main_process:
        _clear(work)


def _keep(work: Path, trained: Path, keep: Path) -> None:
    """Makes a model of every checkpoint: `trained`, with the checkpoint's adapter."""
    for checkpoint in work.glob("checkpoint-*"):
        model = keep / checkpoint.name.removeprefix("checkpoint-")
        shutil.copytree(trained, model, ignore=shutil.ignore_patterns("*.csv", "*.png"), dirs_exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy2(checkpoint / file, model / file)


def _doubt(model: Path, shards: Path, params: Params, work: Path) -> dict[str, float]:
    """For every training image, how unsure the model is of the letter: 1 at even odds, 0 when it is certain."""
    from adfm.evaluation.predictions import predict_splits

    # vLLM would claim the memory of the GPU that holds the model in training, which is already loaded.
    evaluate = params.evaluate.model_copy(update={"backend": "transformers"})
    params = params.model_copy(update={"evaluate": evaluate})
    table = predict_splits(model, shards, params, "looking for doubt", ["train"], work / "answers")["train"]
    odds = table["score"].fillna(0.5)
    return dict(zip(table["id"], (4 * odds * (1 - odds)).tolist(), strict=True))


def _identity(shards: Path, model: Path, params: Params) -> dict[str, Any]:
    """What must be the same for a checkpoint to be of use."""
    sections = params.model_dump(mode="json", by_alias=True, include={"seed", "model", "tile", "train"})
    for no_matter in ("checkpoint_every", "pictures_every", "health", "vllm", "vllm_server"):
        sections["train"].pop(no_matter)
    return {"data": shards_.fingerprint(shards, "train"), "model": digest(model), **sections}


def _resume(work: Path, shards: Path, model: Path, params: Params) -> str | None:
    """The MLflow run to go on with; checkpoints of anything else are set aside."""
    file = work / IDENTITY
    if not file.is_file():
        shutil.rmtree(work, ignore_errors=True)
        return None
    saved, identity = json.loads(file.read_text()), _identity(shards, model, params)
    if saved["identity"] != identity:
        aside = work.with_name(work.name.removesuffix(".checkpoint") + ".old.checkpoint")
        changed = ", ".join(checkpoints.differences(saved["identity"], identity))
        print(f"{work}: the checkpoints are of other data, model or settings: {changed}; they are set aside in {aside}")
        print("starting anew")
        if aside.exists():
            _clear(aside)
        work.rename(aside)
        return None
    from adfm.training.guard import refuse_the_same

    refuse_the_same(work, params.train.health)
    return str(saved["mlflow_run_id"])


def _identify(work: Path, shards: Path, model: Path, params: Params, run_id: str) -> None:
    work.mkdir(parents=True, exist_ok=True)
    replace_json({"identity": _identity(shards, model, params), "mlflow_run_id": run_id}, work / IDENTITY)


def _clear(work: Path) -> None:
    """Removes checkpoints, what makes them usable first: a process that is killed here leaves none to go on from."""
    (work / IDENTITY).unlink()
    shutil.rmtree(work)


def reward_functions(profile: str, located: bool = True, kinds: Sequence[str] = ()) -> list[Any]:
    """One function a term, in TRL's form; what the first of them scores, the others have without scoring again.

    Args:
        profile: A key of `adfm.method.rewards.PROFILES`.
        located: Whether any training image has boxes; see `adfm.method.rewards.calibrated`.
        kinds: The kinds of defects that the prompt asks for; with some there is the term `KIND`, after `TERMS`.
    """
    last: list[list[Any]] = []
    terms: list[rewards.Terms] = []

    def function(term: int) -> Callable[..., list[float]]:
        def reward(
            completions: list[Any], label: list[Label], regions: list[Any], frame: list[Any], **_: Any
        ) -> list[float]:
            columns = [list(completions), list(label), list(regions), list(frame)]
            if columns != last:
                last[:] = columns
                terms[:] = [
                    rewards.in_training(profile, completion[0]["content"], lab, boxes, Frame(*size), located)
                    for completion, lab, boxes, size in zip(*columns, strict=True)
                ]
            return [each[term] for each in terms]

        reward.__name__ = TERMS[term]
        return reward

    def kind(completions: list[Any], label: list[Label], defect: list[str | None], **_: Any) -> list[float]:
        return [
            kinds_.reward(response.parse(completion[0]["content"]), lab, its, kinds)
            for completion, lab, its in zip(completions, label, defect, strict=True)
        ]

    functions: list[Any] = [function(term) for term in range(len(TERMS))]
    if kinds:
        kind.__name__ = KIND
        functions.append(kind)
    return functions


def utilisation(terms: torch.Tensor, weights: torch.Tensor, group: int) -> dict[str, float]:
    """Shares of the groups of one step, in [0, 1].

    Args:
        terms: Rewards `[completions, terms]` in the order of `TERMS`, with or without `KIND` after them; a group's
            completions stand together.
        weights: Weight of each term, `[terms]`.
        group: Completions a group.

    Returns:
        `utilisation`, the same for each term, and the shares of groups whose answers are all right and all wrong.
    """
    grouped = terms.nan_to_num().view(-1, group, terms.shape[1])
    total = grouped @ weights
    share = {"utilisation": (total != total[:, :1]).any(1)}
    for i, term in enumerate((*TERMS, KIND)[: terms.shape[1]]):
        share[f"utilisation/{term}"] = (grouped[:, :, i] != grouped[:, :1, i]).any(1)
    right = grouped[:, :, TERMS.index("classification")] == 1
    share["groups/all_right"], share["groups/all_wrong"] = right.all(1), (~right).all(1)
    return {name: value.float().mean().item() for name, value in share.items()}


def trl_settings(params: Params, processes: int = 1) -> dict[str, Any]:
    """What `params` are among the arguments of TRL's `GRPOConfig`, but for the weights of terms and for generation."""
    import torch

    settings = params.train
    completions, micro_batch = hardware.batch_split(settings, processes)
    return {
        "max_steps": settings.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": completions // micro_batch,
        "num_generations": settings.num_generations,
        "max_completion_length": settings.max_completion_length,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "repetition_penalty": 1.0,
        "min_p": 0.0,  # None, TRL's default, lets transformers take the one of the model's generation_config.json
        # vLLM's log-probabilities are those after top_p and top_k, the trainer's those of all tokens. Their ratio over
        # a whole completion would then weight it by next to nothing, and longer ones by less.
        "vllm_importance_sampling_correction": settings.top_p == 1 and settings.top_k == 0,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup_ratio * settings.steps),
        "beta": settings.beta,
        "epsilon": settings.epsilon,
        "loss_type": settings.loss_type,
        "scale_rewards": settings.scale_rewards,
        "multi_objective_aggregation": settings.aggregation,
        "max_grad_norm": settings.max_grad_norm,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "optim": settings.optimizer,
        "shuffle_dataset": False,
        "logging_steps": 1,
        "save_steps": settings.checkpoint_every,
        "report_to": "none",
        "seed": params.seed,
        "bf16": params.model.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": settings.gradient_checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _trainer(
    loaded: loading.Loaded,
    data: Any,
    reserve: Any,
    work: Path,
    params: Params,
    processes: int,
    keep_all: bool,
    outbox: Outbox | None,
    guard: Guard,
) -> GRPOTrainer:
    import torch
    from accelerate.utils import gather_object
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.data_utils import prepare_multimodal_messages

    from adfm.training import resampling
    from adfm.training.watch import Watch, picture

    settings = params.train
    group = settings.num_generations
    terms_of = reward_functions(settings.profile, any(data["regions"]), loaded.kinds)
    completions, _ = hardware.batch_split(settings, processes)
    unwanted = families.placeholders(loaded.processor)
    generation: dict[str, Any] = {"generation_kwargs": {"suppress_tokens": unwanted}}
    engine: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if settings.vllm or settings.vllm_server:
        from adfm.training import vllm_generation

        # A server has a processor that does not know model.max_pixels; in this process it makes no difference.
        data = examples.as_seen(data, loaded)
        reserve = reserve and examples.as_seen(reserve, loaded)
        generation = vllm_generation.trl_settings(params, loaded, unwanted)
        engine = vllm_generation.installed(loaded)

    class Trainer(GRPOTrainer):
        """TRL's trainer, with dynamic sampling; it also logs utilisation, the seconds of each phase, and pictures."""

        _kept: Any = None

        def __init__(self, **options: Any) -> None:
            with engine:  # TRL starts vLLM in here
                super().__init__(**options)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with images.processed_once(self.processing_class):
                return self._generated_and_scored(inputs)

        def _generated_and_scored(self, inputs: Any) -> Any:
            if settings.dynamic_sampling:
                inputs, self._kept, share = resampling.informative(
                    inputs, self._further, self._answers, self._differ, self._most, group, settings.dynamic_sampling
                )
                self._metrics["train"]["utilisation/drawn"].append(share)
            return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts: Any) -> Any:
            kept, self._kept = self._kept, None
            if kept is not None:
                return kept
            with self._timed("generation"):
                return super()._generate(prompts)

        def _answers(self, rows: Any) -> Any:
            return self._generate([prepare_multimodal_messages(row["prompt"], images=[row["image"]]) for row in rows])

        def _further(self, number: int, count: int) -> Any:
            # A place for every step, round and process, so that a resumed training draws the same.
            at = (self.state.global_step * settings.dynamic_sampling + number) * settings.prompts_per_step
            at += self.accelerator.process_index * completions // group
            return [row for i in range(at, at + count) for row in [reserve[i]] * group]

        def _differ(self, rows: Any, answers: Any) -> bool:
            columns = {name: [row[name] for row in rows] for name in ("label", "defect", "regions", "frame")}
            terms = torch.tensor([function(completions=answers[3], **columns) for function in terms_of])
            return utilisation(terms.T, self.reward_weights.cpu(), group)["utilisation"] > 0

        def _most(self, count: int) -> int:
            return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
            with self._timed("scoring"):
                terms = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            weights = self.reward_weights.to(terms.device)
            for name, value in utilisation(terms, weights, group).items():
                self._metrics["train"][name].append(value)
            columns = zip(inputs, completions, strict=True)
            completed = [health.Completed(r["label"], r["regions"], r["frame"], c[0]["content"]) for r, c in columns]
            for name, value in health.answer_figures(gather_object(completed), group).items():
                self._metrics["train"][name].append(value)
            every, step = settings.pictures_every, self.state.global_step
            if every and step % every == 0 and outbox:
                earned, totals = terms.nan_to_num().tolist(), (terms.nan_to_num() @ weights).tolist()
                names = [
                    f"{function.__name__} (x {weight:g})" if weight != 1 else function.__name__
                    for function, weight in zip(terms_of, weights.tolist(), strict=True)
                ]
                each = [
                    {**row, "completion": c[0]["content"], "reward": total, "terms": dict(zip(names, own, strict=True))}
                    for row, c, own, total in zip(inputs, completions, earned, totals, strict=False)
                ]
                firsts = [each[k : k + 4] for k in range(0, min(len(each), 3 * group), group)]
                outbox.add_picture(picture([s for first in firsts for s in first]), f"completions/step-{step:05d}.png")
            return terms

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self._loss_begun = time.perf_counter()
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            step: Any = super().training_step  # untyped in TRL
            loss = step(*args, **kwargs)
            self._metrics["train"]["seconds/backward"].append(
                (time.perf_counter() - self._loss_begun) * self.args.gradient_accumulation_steps
            )
            return loss

        def _get_output_dir(self, trial: Any) -> str:
            return str(checkpoints.partial(work))

        def _save_checkpoint(self, *args: Any) -> None:
            save_checkpoint: Any = super()._save_checkpoint  # untyped in TRL
            save_checkpoint(*args)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                checkpoints.publish(work, None if keep_all else settings.health.patience)
            self.accelerator.wait_for_everyone()

        def _timed(self, phase: str) -> Any:
            return _Timer(self._metrics["train"][f"seconds/{phase}"])

    trainer = Trainer(
        model=loaded.model,
        reward_funcs=terms_of,
        train_dataset=data,
        processing_class=loaded.processor,
        callbacks=[
            Watch(
                "grpo",
                ["reward", *terms_.MEANS, "utilisation", "answers/anomalous_share"],
                outbox,
            ),
            guard,
        ],
        args=GRPOConfig(
            output_dir=str(work),
            **trl_settings(params, processes),
            reward_weights=[getattr(settings.weights, term.__name__) for term in terms_of],
            **generation,
            logging_nan_inf_filter=False,
        ),
    )
    trainer.train_dataset = images.Rows(data)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class _Timer:
    """Appends the seconds of its block to a list."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds.append(time.perf_counter() - self._start)
