"""The GRPO trainer: TRL's, with the reward's terms, dynamic sampling, and metrics that show what a group taught."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import prepare_multimodal_messages

from adfm.method import kinds as kinds_
from adfm.method import response, rewards
from adfm.method import terms as terms_
from adfm.method.coordinates import Frame
from adfm.models import families, hardware
from adfm.models.loading import Loaded
from adfm.params import Params
from adfm.records import Box, Label
from adfm.training import checkpoints, examples, health, images
from adfm.training.callbacks import MetricsCallback
from adfm.training.dynamic_sampling import fill_batch
from adfm.training.figures import completion_sheet
from adfm.training.health import StopCallback
from adfm.training.outbox import Outbox

TERMS = rewards.Terms._fields
KIND = "kind"  # a further term, only of a model whose prompt asks for the defect's kind

# Settings in `train` that have the name and the meaning of those of TRL's `GRPOConfig`.
_SAME_IN_TRL = {
    *("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "beta", "epsilon", "loss_type"),
    *("scale_rewards", "learning_rate", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2"),
}


def reward_functions(profile: str, located: bool = True, kinds: Sequence[str] = ()) -> list[Any]:
    """Return a function for each term, in TRL's form.

    Args:
        profile: A key of `adfm.method.rewards.PROFILES`.
        located: Whether any training image has boxes; see `adfm.method.rewards.calibrated`.
        kinds: The kinds of defects that the prompt asks for; with some there is the term `KIND`, after `TERMS`.
    """

    # TRL calls the functions one after the other with the same columns; each completion is scored once.
    @functools.lru_cache(maxsize=4096)
    def score(text: str, label: Label, regions: tuple[Box, ...], frame: tuple[float, float]) -> rewards.Terms:
        return rewards.in_training(profile, text, label, regions, Frame(*frame), located)

    def function(name: str) -> Callable[..., list[float]]:
        def reward(completions: Any, label: Any, regions: Any, frame: Any, **_: Any) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            truths = [tuple(Box(*box) for box in boxes) for boxes in regions]
            columns = zip(texts, label, truths, map(tuple, frame), strict=True)
            return [getattr(score(*column), name) for column in columns]

        reward.__name__ = name
        return reward

    def kind(completions: list[Any], label: list[Label], defect: list[str | None], **_: Any) -> list[float]:
        return [
            kinds_.reward(response.parse(completion[0]["content"]), lab, its, kinds)
            for completion, lab, its in zip(completions, label, defect, strict=True)
        ]

    kind.__name__ = KIND
    return [*map(function, TERMS), *([kind] if kinds else [])]


def utilisation(terms: torch.Tensor, weights: torch.Tensor, group: int) -> dict[str, float]:
    """Return shares of the groups of one step, in [0, 1].

    Args:
        terms: Rewards `[completions, terms]` in the order of `TERMS`, with or without `KIND` after them; a group's
            completions are adjacent.
        weights: Weight of each term, `[terms]`.
        group: Completions a group.

    Returns:
        `utilisation`, the share whose total rewards are not all equal; the same for each term; and the shares of groups
        whose answers are all right and all wrong.
    """
    grouped = terms.nan_to_num().view(-1, group, terms.shape[1])
    total = grouped @ weights
    # Compared exactly: the advantage of a group is zero only if all its rewards are the same.
    share = {"utilisation": (total != total[:, :1]).any(1)}
    for i, term in enumerate((*TERMS, KIND)[: terms.shape[1]]):
        share[f"utilisation/{term}"] = (grouped[:, :, i] != grouped[:, :1, i]).any(1)
    right = grouped[:, :, TERMS.index("classification")] == 1
    share["groups/all_right"], share["groups/all_wrong"] = right.all(1), (~right).all(1)
    return {name: value.float().mean().item() for name, value in share.items()}


def trl_settings(params: Params, processes: int = 1) -> dict[str, Any]:
    """Return the arguments of TRL's `GRPOConfig`, except the weights of terms and those of generation."""
    settings = params.train
    completions, micro_batch = hardware.batch_split(settings, processes)
    return {
        **settings.model_dump(include=_SAME_IN_TRL),
        "max_steps": settings.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": completions // micro_batch,
        "repetition_penalty": 1.0,
        "min_p": 0.0,  # None, TRL's default, lets transformers take the one of the model's generation_config.json
        # vLLM's log-probabilities are those after top_p and top_k, the trainer's those of all tokens. Their ratio over
        # a whole completion would then weight it by next to nothing, and longer ones by less.
        "vllm_importance_sampling_correction": settings.top_p == 1 and settings.top_k == 0,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup_ratio * settings.steps),
        "multi_objective_aggregation": settings.aggregation,
        "optim": settings.optimizer,
        "shuffle_dataset": False,  # `examples.draw` decides the order
        "logging_steps": 1,  # health checks and curves need every step
        "save_steps": settings.checkpoint_every,
        "report_to": "none",  # MetricsCallback reports
        "seed": params.seed,
        "bf16": params.model.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": settings.gradient_checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


class GrpoTrainer(GRPOTrainer):
    """TRL's trainer with dynamic sampling; it also logs utilisation, seconds of each phase, and sampled completions.

    Args:
        loaded: The model to train.
        data: As `adfm.training.examples.draw` returns it.
        reserve: The same of further images, for dynamic sampling, or `None`.
        work: Folder of the checkpoints.
        params: Reads `model`, `train` and `seed`.
        processes: Among which the completions of a step are divided.
        keep_all: Whether to keep every checkpoint.
        outbox: For metrics and pictures; `None` in all processes but the first.
        stop: Ends training early.
    """

    def __init__(
        self,
        loaded: Loaded,
        data: Any,
        reserve: Any,
        work: Path,
        params: Params,
        processes: int,
        keep_all: bool,
        outbox: Outbox | None,
        stop: StopCallback,
    ) -> None:
        self._settings, self._work, self._keep_all, self._outbox = params.train, work, keep_all, outbox
        self._group = params.train.num_generations
        self._generated: Any = None
        self._terms_of = reward_functions(params.train.profile, any(data["regions"]), loaded.kinds)
        unwanted = families.placeholders(loaded.processor)
        generation: dict[str, Any] = {"generation_kwargs": {"suppress_tokens": unwanted}}
        engine: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if params.train.vllm or params.train.vllm_server:
            from adfm.training import vllm_generation

            # A server has a processor that does not know model.max_pixels; in this process it makes no difference.
            data = examples.as_seen(data, loaded)
            reserve = reserve and examples.as_seen(reserve, loaded)
            generation = vllm_generation.trl_settings(params.train, loaded, unwanted)
            engine = vllm_generation.installed(loaded)
        self._reserve = reserve
        logged = ["reward", *terms_.MEANS, "utilisation", "answers/anomalous_share"]
        with engine:  # TRL starts vLLM in here
            super().__init__(
                model=loaded.model,
                reward_funcs=self._terms_of,
                train_dataset=data,
                processing_class=loaded.processor,
                callbacks=[MetricsCallback("grpo", logged, outbox), stop],
                args=GRPOConfig(
                    output_dir=str(work),
                    **trl_settings(params, processes),
                    reward_weights=[getattr(params.train.weights, term.__name__) for term in self._terms_of],
                    **generation,
                    logging_nan_inf_filter=False,  # the health checks look for NaN
                    disable_tqdm=True,
                ),
            )
        self.train_dataset = images.Rows(data)
        self.remove_callback(PrinterCallback)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        with images.processed_once(self.processing_class):
            if rounds := self._settings.dynamic_sampling:
                functions = self._next_groups, self._complete, self._has_variance, self._max_over_ranks
                inputs, self._generated, share = fill_batch(inputs, *functions, self._group, rounds)
                self._metrics["train"]["utilisation/drawn"].append(share)
            return super()._generate_and_score_completions(inputs)

    def _generate(self, prompts: Any) -> Any:
        generated, self._generated = self._generated, None
        if generated is not None:
            return generated
        with self._timed("generation"):
            return super()._generate(prompts)

    def _complete(self, rows: Any) -> Any:
        return self._generate([prepare_multimodal_messages(row["prompt"], images=[row["image"]]) for row in rows])

    def _next_groups(self, number: int, count: int) -> Any:
        settings, processes = self._settings, self.accelerator.num_processes
        # A place for every step, round and process, so that a resumed training draws the same.
        at = (self.state.global_step * settings.dynamic_sampling + number) * settings.prompts_per_step
        at += self.accelerator.process_index * settings.prompts_per_step // processes
        return [row for i in range(at, at + count) for row in [self._reserve[i]] * self._group]

    def _has_variance(self, rows: Any, generated: Any) -> bool:
        columns = {name: [row[name] for row in rows] for name in ("label", "defect", "regions", "frame")}
        terms = torch.tensor([function(completions=generated[3], **columns) for function in self._terms_of])
        return utilisation(terms.T, self.reward_weights.cpu(), self._group)["utilisation"] > 0

    def _max_over_ranks(self, count: int) -> int:
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        with self._timed("scoring"):
            terms = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        weights = self.reward_weights.to(terms.device)
        texts = [completion[0]["content"] for completion in completions]
        completed = [
            health.Completed(row["label"], row["regions"], row["frame"], text)
            for row, text in zip(inputs, texts, strict=True)
        ]
        answers = health.answer_metrics(gather_object(completed), self._group)
        for name, value in (utilisation(terms, weights, self._group) | answers).items():
            self._metrics["train"][name].append(value)
        every, step = self._settings.pictures_every, self.state.global_step
        if self._outbox and every and step % every == 0:
            sheet = self._completion_sheet(inputs, texts, terms.nan_to_num(), weights)
            self._outbox.add_picture(sheet, f"completions/step-{step:05d}.png")
        return terms

    def _completion_sheet(self, inputs: Any, texts: list[str], terms: torch.Tensor, weights: torch.Tensor) -> Any:
        # The first four completions of each of the first three groups.
        names = [
            f"{function.__name__} (x {weight:g})" if weight != 1 else function.__name__
            for function, weight in zip(self._terms_of, weights.tolist(), strict=True)
        ]
        # With several processes `inputs` and `texts` are this one's, and come first: TRL gathers the terms of all.
        earned = [dict(zip(names, row, strict=True)) for row in terms.tolist()]
        samples = [
            {**row, "completion": text, "reward": total, "terms": own}
            for row, text, total, own in zip(inputs, texts, (terms @ weights).tolist(), earned, strict=False)
        ]
        group = self._group
        firsts = [samples[k : k + 4] for k in range(0, min(len(samples), 3 * group), group)]
        return completion_sheet([sample for first in firsts for sample in first])

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and note when it began."""
        self._loss_begun = time.perf_counter()
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a micro-batch, and log the seconds since the loss began."""
        step: Any = super().training_step  # untyped in TRL
        loss = step(*args, **kwargs)
        # Times their number, since TRL logs the mean over the micro-batches of a step.
        seconds = (time.perf_counter() - self._loss_begun) * self.args.gradient_accumulation_steps
        self._metrics["train"]["seconds/backward"].append(seconds)
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.partial(self._work))

    def _save_checkpoint(self, *args: Any) -> None:
        save_checkpoint: Any = super()._save_checkpoint  # untyped in TRL
        save_checkpoint(*args)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoints.publish(self._work, None if self._keep_all else self._settings.health.patience)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        seconds = self._metrics["train"][f"seconds/{phase}"]
        start = time.perf_counter()
        yield
        seconds.append(time.perf_counter() - start)
