"""The ablation: what the stages and the fine-grained reward are each good for.

Every arm goes through SFT, GRPO and evaluation with the same base model, data, steps and seeds; the settings of an
arm are all that differs, so that `dvc exp run -S train.profile=paper` repeats one by hand. Runs are kept:

    <arm>-<seed>/run.json            what the run is of; another of the same name is refused
    <arm>-<seed>/sft, trained     the models, with the curves of their trainings
    <arm>-<seed>/steps/<step>        the adapter of every checkpoint
    <arm>-<seed>/answers             predictions, a folder a model
    <arm>-<seed>/result.json         the figures; with it the run is finished
    <arm>-<seed>/log.txt             what was printed
"""

import csv
import json
import multiprocessing
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adfm import tracking
from adfm.data import shards as shards_
from adfm.drawing import WIDTH, drawn, panels, smoothed
from adfm.errors import AdfmError
from adfm.evaluation.plots import TITLES
from adfm.files import replace_json, replace_text, write_json
from adfm.method.terms import WEIGHTS
from adfm.models import loading
from adfm.params import Params, flat, loads
from adfm.process import cpus
from adfm.process.stopping import Terminated

METRICS = ("balanced_accuracy", "iou", "utilisation", "recall", "specificity")
_ON_CURVE = tuple(name for name in METRICS if name != "utilisation")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Args:
        title: What it is, for tables.
        settings: `key=value`, all that tells it from the settings of the whole ablation.
    """

    title: str
    settings: tuple[str, ...]


_LETTER_ALONE = tuple(
    f"train.weights.{term}=0" for term, weight in WEIGHTS._asdict().items() if weight and term != "classification"
)
ARMS = {
    "answer": Arm("no stages, answer-only reward", ("sft.stages=false", *_LETTER_ALONE)),
    "stages": Arm("stages, answer-only reward", _LETTER_ALONE),
    "paper": Arm("stages, `paper` reward", ("train.profile=paper",)),
    "calibrated": Arm("stages, `calibrated` reward", ("train.profile=calibrated",)),
    "resample": Arm(
        "the same, groups of equal rewards redrawn", ("train.profile=calibrated", "train.dynamic_sampling=2")
    ),
    "doubt": Arm(
        "the same, doubtful images more often", ("train.profile=calibrated", "train.uncertainty_sampling=true")
    ),
}
_TITLES = {name: title[0].upper() + title[1:] for name in METRICS for title in [TITLES.get(name, name)]}
_COLOURS = dict(zip(ARMS, ("#6b7785", "#b35c00", "#7b4fb5", "#1f5fae", "#2ea043", "#bf8700"), strict=True))


def ablate(shards: Path, runs: Path, out: Path, params: Params, arms: Sequence[str], seeds: int, jobs: int) -> None:
    """Does the runs that are missing, and writes `ablation.json`, `ablation.md` and `ablation.png` to `out`.

    What was finished before is kept, and a run that was interrupted goes on from its last checkpoint. The report is
    written anew after every run, from those that are finished.

    Args:
        shards: Folder of shards; every run trains and is judged on the same.
        runs: Folder of the runs.
        out: Folder of the report.
        params: The settings that all arms share; seeds count from `seed`.
        arms: Keys of `ARMS`.
        seeds: Runs an arm.
        jobs: Runs at a time; they share the cores.

    Raises:
        AdfmError: An arm is unknown, there is nothing to do, `runs` holds runs of other settings, data or model, or a
            run failed.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise AdfmError(f"there is no arm {unknown[0]!r}; there are: {', '.join(ARMS)}")
    if seeds < 1 or jobs < 1:
        raise AdfmError(f"{min(seeds, jobs)} is too few: --seeds and --jobs are 1 at least")
    shared = tracking.settings(params)
    planned = {
        # An arm that collapses is a finding: every arm takes all steps.
        (arm, seed): loads(shared, [*ARMS[arm].settings, f"seed={seed}", "train.health.patience=0"])
        for seed in range(params.seed, params.seed + seeds)
        for arm in arms
    }
    data = {split: shards_.fingerprint(shards, split) for split in ("train", params.evaluate.split)}
    base = loading.identity(params.model.name, params.model)
    missing = []
    for (arm, seed), settings in planned.items():
        identity = {"data": data, "base": base, "params": flat(settings)}
        if not _begin(runs / f"{arm}-{seed}", identity):
            missing.append((arm, seed))
    _report(runs, out, params, list(planned))
    if missing:  # the runs would make the same tables and the same experiment at the same time
        tracking.configure()
        tracking.experiment(params.mlflow.experiment)
    failed = []
    threads = cpus.share(jobs)
    # A process a run: libraries keep state, and a run that dies takes no other with it.
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool,
        _begins_no_more(pool),
    ):
        begun = {
            pool.submit(_run, shards.resolve(), (runs / f"{arm}-{seed}").resolve(), planned[arm, seed], threads): (
                f"{arm}-{seed}"
            )
            for arm, seed in missing
        }
        for done in as_completed(begun):
            if done.exception():
                failed.append(begun[done])
                print(f"{begun[done]}: failed; see {runs / begun[done] / 'log.txt'}", file=sys.stderr)
                continue
            figures = ", ".join(f"{name} {_shown(interval([done.result()[name]]))}" for name in METRICS)
            print(f"{begun[done]}: {figures}", flush=True)
            _report(runs, out, params, list(planned))
    if failed:
        raise AdfmError(
            f"{len(failed)} of {len(planned)} runs failed: {', '.join(failed)}; start again to go on with them"
        )


@contextmanager
def _begins_no_more(pool: ProcessPoolExecutor) -> Iterator[None]:
    """On an interrupt, cancel the runs that have not started; on SIGTERM, terminate the running ones as well."""
    try:
        yield
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for run in multiprocessing.active_children() if isinstance(error, Terminated) else ():
            run.terminate()
        raise


def _begin(run: Path, identity: dict[str, Any]) -> bool:
    """Whether the run is finished; makes its folder if there is none."""
    file = run / "run.json"
    if not file.is_file():
        run.mkdir(parents=True, exist_ok=True)
        write_json(identity, file)
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    settings = flat(Params()) | found["params"]  # a setting that is newer than the run had its default there
    changed = [key for key in ("data", "base") if found[key] != identity[key]]
    if changed := changed + [key for key, value in identity["params"].items() if settings[key] != value]:
        raise AdfmError(f"{run} is a run with another {', '.join(changed)}; remove it, or choose another folder")
    return (run / "result.json").is_file()


def _run(shards: Path, run: Path, params: Params, threads: int) -> dict[str, Any]:
    """One run, in a process of its own."""
    log = (run / "log.txt").open("a")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    from adfm.process.environment import set_environment

    set_environment()
    import torch

    from adfm.evaluation import metrics, predictions
    from adfm.training.grpo import train
    from adfm.training.sft import sft

    torch.set_num_threads(threads)
    try:
        if not (run / "sft").exists():
            sft(shards, run / "sft", params)
        if not (run / "trained").exists():
            train(shards, run / "sft", run / "trained", params, keep=run / "steps")
        models = {int(folder.name): folder for folder in (run / "steps").iterdir()}
        models |= {0: run / "sft", params.train.steps: run / "trained"}
        curve = []
        for step, model in sorted(models.items()):
            split = params.evaluate.split
            table = predictions.predict_splits(model, shards, params, f"step {step}", [split], run / "answers")[split]
            curve.append({"step": step, **metrics.values(table)})
    except BaseException:
        traceback.print_exc()
        raise
    with (run / "trained" / "reward_curves.csv").open(newline="") as stream:
        used = [[int(row["step"]), float(row["utilisation"])] for row in csv.DictReader(stream)]
    result: dict[str, Any] = {name: curve[-1][name] for name in _ON_CURVE}
    result |= {"utilisation": float(np.mean([share for _, share in used])), "steps": params.train.steps}
    result["curve"] = [[point["step"], point["balanced_accuracy"], point["iou"]] for point in curve]
    result["curves"] = {name: [[point["step"], point[name]] for point in curve] for name in _ON_CURVE}
    result["curves"]["utilisation"] = used
    replace_json(result, run / "result.json")
    return result


def _report(runs: Path, out: Path, params: Params, planned: Sequence[tuple[str, int]]) -> None:
    """Writes what the finished ones of the planned runs show."""
    evidence: dict[str, dict[int, dict[str, Any]]] = {}
    for arm, seed in planned:
        file = runs / f"{arm}-{seed}" / "result.json"
        if file.is_file():
            evidence.setdefault(arm, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    if not evidence:
        return
    out.mkdir(parents=True, exist_ok=True)
    draw(evidence, out / "ablation.png")
    text = describe(evidence, params, len(planned))
    for name, content in {"ablation.json": json.dumps(evidence, indent=1) + "\n", "ablation.md": text}.items():
        replace_text(content, out / name)


def interval(values: Sequence[float | None]) -> tuple[float, float, float]:
    """Mean of runs over seeds, and its 95 % interval by Student's t; the interval of one run is not finite.

    NaN where a run lacks the metric, as it does IoU if no image has boxes.
    """
    from scipy.stats import t

    known = [np.nan if value is None else value for value in values]
    mean = float(np.mean(known))
    if len(values) < 2:
        return mean, -np.inf, np.inf
    half = float(t.ppf(0.975, len(values) - 1) * np.std(known, ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def claims(evidence: dict[str, dict[int, dict[str, Any]]]) -> list[tuple[str, bool]]:
    """What the paper's ideas promise, in words with the numbers, and whether it was found.

    Args:
        evidence: Figures by arm and seed; a claim about an arm or a metric that is not there is left out.
    """

    def over_seeds(arm: str, name: str) -> tuple[float, float, float]:
        return interval([run[name] for run in evidence[arm].values()])

    found = []
    if {"answer", "calibrated"} <= evidence.keys():
        used, plain = over_seeds("calibrated", "utilisation")[0], over_seeds("answer", "utilisation")[0]
        words = f"Utilisation of the full method, {used:.3f}, is at least twice that of the answer alone, {plain:.3f}"
        found.append((words, used >= 2 * plain))
        for name in ("balanced_accuracy", "iou"):
            full, alone = over_seeds("calibrated", name), over_seeds("answer", name)
            if np.isnan(full[0]) or np.isnan(alone[0]):
                continue
            words = f"{_TITLES[name]} of the full method, {_shown(full)}, is above the answer alone's, {_shown(alone)}"
            found.append((f"{words}, and the intervals are apart", full[1] > alone[2]))
    if {"paper", "calibrated"} <= evidence.keys():
        for name in ("balanced_accuracy", "iou"):
            ours, published = over_seeds("calibrated", name)[0], over_seeds("paper", name)[0]
            if np.isnan(ours) or np.isnan(published):
                continue
            words = f"{_TITLES[name]} with `calibrated`, {ours:.3f}, is not below that with `paper`, {published:.3f}"
            found.append((words, ours >= published))
    if {"answer", "calibrated"} <= evidence.keys():
        goal = over_seeds("answer", "balanced_accuracy")[0]
        curve = _mean_curve(evidence["calibrated"], "balanced_accuracy")
        last = int(curve[-1, 0])
        reached = next((int(step) for step, value in curve if value >= goal), None)
        took = f"it takes {reached}" if reached is not None else "it does not reach it"
        words = f"The full method reaches the answer alone's final balanced accuracy, {goal:.3f}, in half of {last}"
        words += f" steps: {took}"
        found.append((words, reached is not None and reached <= last / 2))
    return found


def describe(evidence: dict[str, dict[int, dict[str, Any]]], params: Params, planned: int) -> str:
    """The report, in Markdown."""
    head = ["arm", "seeds", *(_TITLES[name] for name in METRICS), "before GRPO: balanced accuracy, IoU"]
    rows = [
        [
            ARMS[arm].title,
            ", ".join(map(str, found)),
            *(_shown(interval([run[name] for run in found.values()])) for name in METRICS),
            ", ".join(
                "-" if np.isnan(mean) else f"{mean:.3f}"
                for mean in np.mean(np.array([run["curve"][0][1:] for run in found.values()], float), axis=0)
            ),
        ]
        for arm, found in evidence.items()
    ]
    finished = sum(map(len, evidence.values()))
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    settings = "\n".join(
        f"- **{ARMS[arm].title}**: `dvc exp run {' '.join(f'-S {setting}' for setting in ARMS[arm].settings)}`"
        for arm in evidence
    )
    usual = flat(Params())
    shared = "".join(f" --set {key}={value}" for key, value in flat(params).items() if value != usual[key])
    verdicts = "\n".join(f"- **{'Found' if holds else 'Not found'}**: {words}." for words, holds in claims(evidence))
    return f"""\
# Ablation: stages and reward

```sh
python -m experiments ablation data/shards ablation docs{shared}
```

wrote this page; {finished} of {planned} runs are in it. Each arm starts from the same base model
(`{params.model.name}`), sees the same data in the same order of the same seed, and takes {params.train.steps} steps of
{params.train.prompts_per_step} images with {params.train.num_generations} completions each. Mean and 95 % interval over
the seeds (Student's t); held-out images, greedy decoding. Utilisation is the mean over the steps of a run. A model that
answers without stages draws no boxes, and its IoU is 0.

{table}

{verdicts}

![Balanced accuracy, IoU, recall, specificity and utilisation against steps](ablation.png)

The figure shows the mean against steps, and at the right its 95 % interval after the last; utilisation is smoothed. The
arms, as one run of the pipeline each (seeds by `-S seed=1`, which also changes the split of the data there):

{settings}
"""


def draw(evidence: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Draws the mean of the seeds for each metric against steps, and at the right its 95 % interval after the last."""
    with drawn(path, WIDTH, 5) as figure:
        *axes_of, legend = panels(figure, len(METRICS) + 1, 3)
        for name, axes in zip(METRICS, axes_of, strict=True):
            for place, (arm, of_arm) in enumerate(evidence.items()):
                curves = [np.array(run["curves"][name], float) for run in of_arm.values()]
                steps, values = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
                if name == "utilisation":
                    values = np.array([*map(smoothed, values)])
                label = textwrap.fill(ARMS[arm].title.replace("`", ""), 28)
                axes.plot(steps, values.mean(0), color=_COLOURS[arm], label=label)
                mean, low, high = interval(values[:, -1].tolist())
                if len(curves) > 1:
                    beside = steps[-1] * (1.06 + 0.035 * place)
                    axes.plot([beside] * 2, np.clip([low, high], 0, 1), color=_COLOURS[arm], lw=2, alpha=0.6)
                    axes.plot(beside, mean, ".", color=_COLOURS[arm])
            axes.set_title(_TITLES[name], loc="left", fontweight="bold")
            axes.set(xlabel="step of GRPO", xticks=np.linspace(0, steps[-1], 5))
        legend.set_axis_off()
        title = "Mean of the seeds; bars at the\nright: 95 % interval at the end"
        key = legend.legend(
            *axes.get_legend_handles_labels(), loc="center", frameon=False, title=title, alignment="left"
        )
        key.set_in_layout(False)  # columns of panels stay equally wide


def _shown(found: tuple[float, float, float]) -> str:
    mean, low, high = found
    if np.isnan(mean):
        return "-"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(low) else f"{mean:.3f}"


def _mean_curve(runs: dict[int, dict[str, Any]], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Steps and the mean of a metric at each, `[n, 2]`."""
    return np.asarray(np.mean([run["curves"][name] for run in runs.values()], axis=0))
