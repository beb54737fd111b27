"""Error rates and power of the promotion gate, by simulation of the gate itself.

python benchmarks/gate_errors.py                   # the table of docs/gate.md; about 20 minutes on two cores
python benchmarks/gate_errors.py --runs 100        # a quick look
python benchmarks/gate_errors.py --limits          # how often each confidence limit falls short of the truth
python benchmarks/gate_errors.py --images          # images that margins and limits need

Draws prediction tables of models whose true rates are known, lets `adfm.registry.gate.decide` judge them by the default
policy, and counts how often they pass; each share has its Monte Carlo error (two standard errors). Production has a
recall of 0.90, a specificity of 0.85 and an IoU of 0.45 on 1,600 images, half of them anomalous, of 5 categories and 4
kinds of defect; two models of equal truth disagree on 12 % of the images, and their boxes differ. Ends with status 1 if
a goal is missed by more than the Monte Carlo error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from adfm import statistics
from adfm.registry import gate
from adfm.registry.policy import Policy

IMAGES, CATEGORIES, DEFECTS = 1600, 5, 4
DISAGREE = 0.12
Floats = NDArray[np.float64]
Random = np.random.Generator
Sample = tuple[Floats, NDArray[np.int64] | None]


@dataclass(frozen=True)
class Truth:
    """True rates of a model; `iou` is that of detected defects, and `fallen` what category 0 loses of both rates."""

    recall: float = 0.90
    specificity: float = 0.85
    iou: float = 0.50
    fallen: float = 0.0

    @property
    def iou_of_all(self) -> float:
        return self.iou * self.recall


PRODUCTION = Truth()


@dataclass(frozen=True)
class Model:
    """What a model did on the test images: right or not, and how well each defect is boxed if detected."""

    truth: Truth
    right: NDArray[np.bool_]
    boxed: Floats


class Plant:
    """Test images, and models that judge them."""

    def __init__(self, random: Random, categories: int = CATEGORIES):
        self.random = random
        place = np.arange(IMAGES)
        self.anomalous = place % 2 == 0
        self.category = place // 2 % categories
        defect = place // 2 // categories % DEFECTS
        self.frame = pd.DataFrame(
            {
                "id": [f"{number:06}" for number in place],
                "category": [f"category {number}" for number in self.category],
                "label": np.where(self.anomalous, "anomalous", "normal"),
                "defect": np.where(self.anomalous, [f"defect {number}" for number in defect], None),
            }
        )
        self.ease = random.uniform(0.28, 0.72, IMAGES)  # how well a defect can be boxed; mean 0.5

    def rates(self, truth: Truth) -> Floats:
        rate = np.where(self.anomalous, truth.recall, truth.specificity)
        return rate - np.where(self.category == 0, truth.fallen, 0)

    def model(self, truth: Truth) -> Model:
        return Model(truth, self.random.random(len(self.ease)) < self.rates(truth), self._boxed(truth))

    def successor(self, before: Model, truth: Truth) -> Model:
        """A model that judges most images as the one before does, and has the rates of `truth`."""
        was, rate = self.rates(before.truth), self.rates(truth)
        # Right before and wrong now, less than wrong before and right now by what the rate rises.
        lost = np.maximum((DISAGREE - np.abs(rate - was)) / 2, 0) + np.maximum(was - rate, 0)
        lost = np.minimum(lost, was)
        won = rate - was + lost
        draw = self.random.random(len(self.ease))
        right = np.where(before.right, draw >= lost / was, draw < won / np.maximum(1 - was, 1e-9))
        return Model(truth, right, self._boxed(truth))

    def table(self, model: Model) -> pd.DataFrame:
        """The prediction table of a model."""
        other = np.where(self.anomalous, "normal", "anomalous")
        return self.frame.assign(
            predicted=np.where(model.right, self.frame["label"], other),
            iou=np.where(self.anomalous, np.where(model.right, model.boxed, 0.0), np.nan),
        )

    def _boxed(self, truth: Truth) -> Floats:
        noise = self.random.uniform(-0.12, 0.12, len(self.ease))
        return np.asarray((self.ease + noise) * truth.iou / 0.50)


def passes(
    policy: Policy, candidate: pd.DataFrame, production: pd.DataFrame | None, anchor: pd.DataFrame | None, look: int = 1
) -> bool:
    return gate.decide(candidate, production, anchor, policy, look).passed


# ------------------------------------------------------------------------------------------------------- scenarios


def one(policy: Policy, truth: Truth, look: int, categories: int, random: Random) -> bool:
    """One candidate against production."""
    plant = Plant(random, categories)
    production = plant.model(PRODUCTION)
    candidate = plant.successor(production, truth)
    return passes(policy, plant.table(candidate), plant.table(production), None, look)


def first(policy: Policy, truth: Truth, random: Random) -> bool:
    """One candidate without production."""
    plant = Plant(random)
    return passes(policy, plant.table(plant.model(truth)), None, None)


def many(policy: Policy, truth: Truth, random: Random) -> bool:
    """Whether any of as many candidates as the budget has passes on one test set."""
    plant = Plant(random)
    production = plant.model(PRODUCTION)
    table = plant.table(production)
    return any(
        passes(policy, plant.table(plant.successor(production, truth)), table, None, look)
        for look in range(1, policy.looks + 1)
    )


def descent(policy: Policy, renewed: bool, anchored: bool, random: Random) -> bool:
    """Whether 12 candidates, each with 1 point more escapes than the one in production, lose the margin in the end.

    Args:
        policy: The gate's policy.
        renewed: Whether each candidate has a test set of its own, and so is its first look.
        anchored: Whether the first version stays the anchor.
        random: Source of chance.
    """
    plant = Plant(random)
    anchor = production = plant.model(PRODUCTION)
    for look in range(1, 13):
        if renewed:
            plant = Plant(random)
            anchor = plant.model(anchor.truth)
            production = plant.successor(anchor, production.truth)
        recall = production.truth.recall - 0.01
        truth = replace(production.truth, recall=recall, iou=PRODUCTION.iou_of_all / recall)
        candidate = plant.successor(production, truth)
        tables = [plant.table(model) for model in (candidate, production, anchor)]
        if passes(policy, tables[0], tables[1], tables[2] if anchored else None, 1 if renewed else look):
            production = candidate
    return anchor.truth.recall - production.truth.recall > (policy.whole["escape_rate"].margin or 1) - 1e-9


@dataclass(frozen=True)
class Scenario:
    """What is simulated, and how often it may pass (or has to, `at_least`); a `sequence` is of many decisions."""

    title: str
    trial: Callable[[Random], bool]
    goal: float | None = None
    at_least: bool = False
    sequence: bool = False


def scenarios() -> list[Scenario]:
    """What is simulated, in the order of the table.

    Where passing is the error the categories are not judged, nor, where the candidate is at a margin, is a gain asked
    for: nothing but the question in the title can stop it. Where passing is right the default policy decides, whole.
    """
    policy = Policy()
    whole = policy.model_copy(update={"parts": {}})
    bounds = {name: bound.model_copy(update={"margin": 0.01}) for name, bound in whole.whole.items()}
    narrow = whole.model_copy(update={"whole": bounds})
    noninferior = whole.model_copy(update={"rule": "noninferior"})
    only_look = noninferior.model_copy(update={"looks": 1})
    margin = {name: bound.margin or 0.0 for name, bound in policy.whole.items()}
    limit = {name: bound.limit or 0.0 for name, bound in policy.whole.items()}
    better = Truth(recall=0.93, specificity=0.88)
    worse = {
        "escapes": Truth(0.90 - margin["escape_rate"], 0.95, 0.55),
        "overkill": Truth(0.95, 0.85 - margin["overkill"]),
        "accuracy": Truth(0.90 - margin["accuracy"], 0.85 - margin["accuracy"], 0.55),
        "IoU": Truth(0.93, 0.88, (PRODUCTION.iou_of_all - margin["iou"]) / 0.93),
    }
    at_limit = {
        "escapes": Truth(1 - limit["escape_rate"], 0.95),
        "overkill": Truth(0.95, 1 - limit["overkill"]),
        "accuracy": Truth(2 * limit["accuracy"] - 0.55, 0.55),
        "IoU": Truth(0.9, 0.9, limit["iou"] / 0.9),
    }

    def single(truth: Truth, policy: Policy, look: int = 1, categories: int = CATEGORIES) -> Callable[[Random], bool]:
        return partial(one, policy, truth, look, categories)

    return [
        Scenario("equal in truth", single(PRODUCTION, whole), 0.05),
        Scenario(
            "20 equal candidates on one test set, any passes", partial(many, whole, PRODUCTION), 0.05, sequence=True
        ),
        Scenario(
            "recall -10 points, specificity +14, IoU as before", single(Truth(0.80, 0.99, 0.45 / 0.80), whole), 0.01
        ),
        *(
            Scenario(f"accuracy -1 point, IoU +5, {title}", single(Truth(0.89, 0.84, 0.50 / 0.89), of))
            for title, of in (("margins of 5 points, which allow it", whole), ("margins of 1 point", narrow))
        ),
        *(
            Scenario(f"{name} worse by the margin, {title}", single(truth, of), 0.05)
            for name, truth in worse.items()
            for title, of in (("level 0.05", only_look), ("look 1 of 20", noninferior))
        ),
        *(
            Scenario(f"{name} at the limit, no production, level 0.05", partial(first, only_look, truth), 0.05)
            for name, truth in at_limit.items()
        ),
        *(
            Scenario(
                f"one of 5 categories (320 images) {100 * fallen:.0f} points worse, the others better",
                single(Truth(0.95, 0.92, 0.50, fallen + 0.06), policy),
                0.05,
            )
            for fallen in (0.20, 0.25, 0.30)
        ),
        *(
            Scenario(
                f"one of 20 categories (80 images, too few to be judged alone) {100 * fallen:.0f} points worse",
                single(Truth(0.95, 0.92, 0.50, fallen + 0.06), policy, categories=20),
            )
            for fallen in (0.20, 0.30)
        ),
        *(
            Scenario(
                f"12 candidates, each with 1 point more escapes, {title}: the margin is lost",
                partial(descent, noninferior, renewed, anchored),
                0.05 if anchored else None,
                sequence=True,
            )
            for title, renewed, anchored in (
                ("one test set", False, True),
                ("12 test sets", True, True),
                ("12 test sets, no anchor", True, False),
            )
        ),
        *(
            Scenario(
                f"better by 3 points, look {look}", single(better, policy, look), 0.80 if look == 1 else None, True
            )
            for look in (1, 2, 5, 10, 20)
        ),
        *(
            Scenario(
                f"equal in truth, rule noninferior, look {look}",
                single(PRODUCTION, policy.model_copy(update={"rule": "noninferior"}), look),
            )
            for look in (1, 5, 20)
        ),
    ]


def share(number: int, trials: int, seed: int) -> int:
    """How many trials of a scenario pass."""
    random = np.random.default_rng([seed, number])
    return sum(scenarios()[number].trial(random) for _ in range(trials))


def errors(runs: int, processes: int, seed: int) -> int:
    """Prints the table; the exit status is 1 if a goal is missed by more than the Monte Carlo error."""
    print("| candidate against production | passes | goal | |\n|---|---|---|---|", flush=True)
    missed = 0
    with ProcessPoolExecutor(processes) as pool:
        parts = 2 * processes
        trials = [max(1, runs // (4 if scenario.sequence else 1) // parts) for scenario in scenarios()]
        jobs = [
            [pool.submit(share, number, count, seed * parts + part) for part in range(parts)]
            for number, count in enumerate(trials)
        ]
        for scenario, count, job in zip(scenarios(), trials, jobs, strict=True):
            n, passed = count * parts, sum(future.result() for future in job)
            rate = passed / n
            error = 2 * math.sqrt(max(rate * (1 - rate), 1 / n) / n)
            goal, verdict = "", ""
            if scenario.goal is not None:
                over = scenario.goal - rate if scenario.at_least else rate - scenario.goal
                goal = f"at {'least' if scenario.at_least else 'most'} {scenario.goal:.0%}"
                verdict = "kept" if over <= 0 else "within the error" if over <= error else "missed"
                missed += verdict == "missed"
            print(f"| {scenario.title} | {rate:.1%} ± {error:.1%} | {goal} | {verdict} |", flush=True)
    return int(missed > 0)


# ----------------------------------------------------------------------------------------------- limits and images


def limits(runs: int, seed: int) -> int:
    """Prints how often upper limits at level 0.05 and 0.0139 (look 1 of 20) fall short of the truth."""
    random = np.random.default_rng(seed)
    levels = (0.05, statistics.level_of_look(1, 20, 0.05))

    def rate() -> Sample:
        return (random.random(100) < 0.05).astype(float), None

    def pairs(n: int) -> Sample:
        return random.choice([1.0, -1.0, 0.0], n, p=[0.085, 0.035, 0.88]), None

    def sparse() -> Sample:
        return (random.random(400) < 0.02).astype(float), None

    def smaller_boxes() -> Sample:
        return np.where(random.random(400) < 0.1, random.random(400), 0.0), None

    def parts() -> Sample:
        group = np.repeat(np.arange(300), random.choice([1, 2, 10], 300, p=[0.5, 0.4, 0.1]))
        return (random.random(300) < 0.05)[group].astype(float), group

    ours, tango = {"ours": statistics.mean_at_most}, {"Tango": statistics.loss_at_most}
    t_limit = ours | {"t with a pseudo pair": t_at_most}
    cases: list[tuple[str, float, Callable[[], Sample], dict[str, Callable[..., float]]]] = [
        ("rate 0.05, 100 images", 0.05, rate, {"Clopper-Pearson": statistics.rate_at_most}),
        ("loss 0.05, models that differ on 12 % of 100 images", 0.05, partial(pairs, 100), tango),
        ("loss 0.05, models that differ on 12 % of 400 images", 0.05, partial(pairs, 400), tango),
        ("IoU loss 0.02, from 2 % of 400 images", 0.02, sparse, t_limit),
        ("IoU loss 0.05, from 10 % of 400 images", 0.05, smaller_boxes, t_limit),
        ("rate 0.05, 300 parts of 1, 2 or 10 like images", 0.05, parts, ours | {"Korn-Graubard": korn_graubard}),
    ]
    print("| true value, data: limit | missed at level 0.05 | at level 0.0139 |\n|---|---|---|")
    for title, truth, draw, of in cases:
        samples = [draw() for _ in range(runs)]
        for name, limit in of.items():
            short = [np.mean([limit(values, level, group) < truth for values, group in samples]) for level in levels]
            print(f"| {title}: {name} | {short[0]:.1%} | {short[1]:.2%} |", flush=True)
    return 0


def t_at_most(values: Floats, level: float, group: None = None) -> float:
    """The t limit after one pair of +1 and -1 is added (as Agresti and Min 2005 do for proportions)."""
    added = np.append(values, [1.0, -1.0])
    return float(added.mean() + stats.t.isf(level, len(added) - 1) * added.std(ddof=1) / math.sqrt(len(added)))


def korn_graubard(values: Floats, level: float, group: NDArray[np.int64]) -> float:
    """Clopper and Pearson's limit with the effective number of images of Korn and Graubard (1998)."""
    n, parts, rate = len(values), int(group.max()) + 1, float(values.mean())
    if rate in (0.0, 1.0):
        return float(stats.beta.ppf(1 - level, 1, parts)) if rate == 0 else 1.0
    variance = parts / (parts - 1) * float(np.sum(np.bincount(group, values - rate) ** 2)) / n**2
    effective = rate * (1 - rate) / variance * (stats.t.ppf(level, n - 1) / stats.t.ppf(level, parts - 1)) ** 2
    effective = min(effective, n)
    return float(stats.beta.ppf(1 - level, rate * effective + 1, (1 - rate) * effective))


def images() -> int:
    """Prints images that margins and limits need, for power 0.8 / 0.9."""
    levels = [(f"look {look} of 20", statistics.level_of_look(look, 20, 0.05)) for look in (1, 5, 20)]
    header = " | ".join(["level 0.05", *(title for title, _ in levels)])
    columns = [0.05, *(level for _, level in levels)]

    def row(title: str, needed: Callable[[float, float], int | None]) -> None:
        cells = [" / ".join(f"{needed(level, power):,}" for power in (0.8, 0.9)) for level in columns]
        print(f"| {title} | {' | '.join(cells)} |")

    print(f"| margin, images on which the models disagree | {header} |\n|---|{'---|' * len(columns)}")
    for margin in (0.01, 0.02, 0.03, 0.05, 0.1, 0.2):
        for disagree in (0.05, 0.12, 0.2):
            row(
                f"{100 * margin:g} points, {disagree:.0%}",
                lambda level, power: statistics.images_for_loss(math.sqrt(disagree), margin, level, power),  # noqa: B023
            )
    print(f"\n| limit of a rate, true rate | {header} |\n|---|{'---|' * len(columns)}")
    for limit, rate in ((0.005, 0.0), (0.01, 0.0), (0.01, 0.005), (0.02, 0.01), (0.05, 0.02), (0.1, 0.05), (0.35, 0.2)):
        row(
            f"{limit:.1%}, {rate:.1%}",
            lambda level, power: statistics.images_for_rate(rate, limit, level, power),  # noqa: B023
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="trials a row; of sequences, a quarter as many")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limits", action="store_true", help="how often confidence limits fall short")
    parser.add_argument("--images", action="store_true", help="images that margins and limits need")
    options = parser.parse_args(arguments)
    if options.images:
        return images()
    if options.limits:
        return limits(options.runs, options.seed)
    return errors(options.runs, options.processes, options.seed)


if __name__ == "__main__":
    sys.exit(main())
