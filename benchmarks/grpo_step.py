"""Seconds of a GRPO step of adfm against a bare TRL script: same model, data, rewards, settings, by turns, in one run.

python benchmarks/grpo_step.py                           # the default run's settings
python benchmarks/grpo_step.py --steps 4 --rounds 1 --set train.prompts_per_step=2

What adfm adds is within its steps: utilisation and the seconds of each phase, pictures, every figure in MLflow. Prints
the median step of both and their ratio. Ends with status 1 if the ratio is above 1.02.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adfm import params as params_
from adfm import tracking
from adfm.data import synthetic
from adfm.data.conversion import convert
from adfm.models import liger, loading, model_folder
from adfm.params import Params
from adfm.process import environment
from adfm.training import examples, grpo
from adfm.training.sft import sft

MOST = 1.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each training; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    params = params_.load(None, ["sft.steps=0", *args.set, f"train.steps={args.steps}"])
    environment.set_environment()
    ours: list[float] = []
    theirs: list[float] = []
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        synthetic.generate(Path("raw"), images=100)
        convert(Path("raw"), Path("shards"), params)
        sft(Path("shards"), Path("sft"), params)
        for number in range(args.rounds):
            ours += adfm(Path(f"adfm-{number}"), params)
            theirs += bare(Path(f"bare-{number}"), params)
        os.chdir("/")
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"adfm      {statistics.median(ours):.3f} s a step, {len(ours)} steps")
    print(f"bare TRL  {statistics.median(theirs):.3f} s a step, {len(theirs)} steps")
    print(f"ratio     {ratio:.3f}")
    return int(ratio > MOST)


def adfm(out: Path, params: Params) -> list[float]:
    """Seconds of the steps of a training, from one entry in MLflow to the next."""
    grpo.train(Path("shards"), Path("sft"), out, params)
    store = tracking.client()
    run_id = str((model_folder.describe(out) or {})["mlflow_run_id"])
    times = [point.timestamp / 1000 for point in store.get_metric_history(run_id, "Overview/reward")]
    return [after - before for before, after in itertools.pairwise(times)]


def bare(out: Path, params: Params) -> list[float]:
    """Seconds of the steps of the same training as one would write it with TRL alone."""
    from transformers import TrainerCallback, set_seed

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}):
                times.append(time.time())

    set_seed(params.seed)
    settings = params.train
    loaded = loading.load(Path("sft"), params.model, trainable=True)
    if liger.enabled(settings, loaded.family):
        liger.apply(loaded.model)
    count = settings.steps * settings.prompts_per_step
    data = examples.draw(Path("shards"), loaded, count, settings.anomalous_share, params.seed + 1, out / "cache")
    trainer = bare_trainer(loaded, data, out, params)
    trainer.add_callback(Clock())
    trainer.train()
    return [after - before for before, after in itertools.pairwise(times)]


def bare_trainer(loaded: loading.Loaded, data: Any, out: Path, params: Params) -> Any:
    """TRL's trainer with the settings of adfm's, and nothing else."""
    from trl import GRPOConfig, GRPOTrainer

    from adfm.training.trainer import reward_functions, trl_settings

    settings = params.train
    return GRPOTrainer(
        model=loaded.model,
        reward_funcs=reward_functions(settings.profile),
        train_dataset=data,
        processing_class=loaded.processor,
        args=GRPOConfig(
            output_dir=str(out),
            **trl_settings(params),
            use_vllm=settings.vllm is not None,
            vllm_gpu_memory_utilization=settings.vllm or 0.3,
            vllm_enable_sleep_mode=settings.vllm is not None,
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
