"""Completions per second of scoring, against the published reward written plainly, same completions, in one run.

python benchmarks/rewards.py                    # 100,000 completions
python benchmarks/rewards.py --completions 2000

Both are called as a training calls them: a function a term, on the completions of one step after the other. Theirs is
what one would write first: each function reads each completion anew by regular expressions, GIoU is a matrix of numpy,
and scipy matches. Seconds are of the processor, of one thread. Prints the mix of completions, rates and ratios. Ends
with status 1 if the ratio of a profile is below 3, or a number of `paper` differs by more than 1e-6.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from adfm.method import prompt
from adfm.records import Box
from adfm.training import trainer

LEAST = 3.0
STEP, GROUP, SIDE = 300, 6, 504  # the frame for which the published code compares coordinates with 505
KINDS = {
    "whole": 0.80,  # three stages, one to three boxes, a letter
    "no box": 0.08,
    "cut": 0.05,  # ends in the second stage
    "words": 0.04,  # `abnormal` for a letter
    "bare": 0.03,  # no stages
}
AGAIN = 0.05  # share that repeats an earlier completion of its group
PROSE = (
    "The surface shows an even texture with light reflections along the upper edge. ",
    "There is a darker area near the rim that differs from the surroundings. ",
    "The printed mark is sharp and complete, the contour is closed. ",
    "A thin line crosses the coating and ends at the drilled hole. ",
)


# ---------------------------------------------------------------------------------------- the published reward, plainly


def stage(completion: str, name: str) -> str | None:
    found = re.search(rf"<{name}>(.*?)</{name}>", completion, re.DOTALL | re.IGNORECASE)
    return found.group(1) if found else None


def boxes_in(text: str) -> list[list[float]]:
    number = r"\s*(\d+(?:\.\d+)?)\s*"
    return [[float(n) for n in box] for box in re.findall(rf"\[{number},{number},{number},{number}\]", text)]


def format_reward(completion: str) -> float:
    reward = 0.0
    think = (stage(completion, "think") or "").strip()
    rethink = (stage(completion, "rethink") or "").strip()
    answer = (stage(completion, "answer") or "").strip().lower()
    if think:
        reward += 0.3 + (0.1 if len(think) > 10 else 0.0)
    if rethink:
        reward += 0.2 + (0.1 if len(rethink) > 10 else 0.0)
    if answer in ("a", "b"):
        reward += 0.2
    elif "a" in answer or "b" in answer:
        reward += 0.1
    boxes = boxes_in(think)
    if boxes:
        reward += 0.2
        if np.all(np.array(boxes) < 505):
            reward += 0.1
    elif "[" in think and "]" in think:
        reward += 0.1
    return reward


def classification_reward(completion: str, label: str) -> float:
    answer = stage(completion, "answer")
    answer = (completion if answer is None else answer).strip().lower()
    right = "a" if label == "anomalous" else "b"
    if answer == right:
        return 1.0
    return 0.8 if right in answer and len(answer) <= 10 else 0.0


def giou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    union = areas[0] + areas[1] - shared
    sides = np.maximum(a[2:], b[2:]) - np.minimum(a[:2], b[:2])
    hull = max(0.0, sides[0]) * max(0.0, sides[1])
    return (shared / union if union > 0 else 0.0) - ((hull - union) / hull if hull > 0 else 0.0)


def localization_reward(completion: str, label: str, truth: list[list[float]]) -> float:
    predicted = boxes_in((stage(completion, "think") or "").strip())
    m, n = len(predicted), len(truth) if label == "anomalous" else 0
    if n == 0:
        return 0.0 if m == 0 else 0.5 if m == 1 else -0.1
    if m == 0:
        return 0.0
    cost = np.zeros((m, n))
    for i, box in enumerate(np.array(predicted)):
        for j, true in enumerate(np.array(truth)):
            cost[i, j] = -giou(box, true)
    rows, columns = linear_sum_assignment(cost)
    count = 1.0 if m == n else 0.5 if abs(m - n) == 1 else -0.1
    reward = -cost[rows, columns].sum() / m + 0.3 * count
    return float(np.clip((reward + 0.5) / 1.5, 0.0, 1.0))


def plain_functions() -> list[Callable[..., list[float]]]:
    """The terms of the published reward in TRL's form."""

    def form(completions: Any, **_: Any) -> list[float]:
        return [format_reward(c[0]["content"]) for c in completions]

    def letter(completions: Any, label: Any, **_: Any) -> list[float]:
        return [classification_reward(c[0]["content"], y) for c, y in zip(completions, label, strict=True)]

    def place(completions: Any, label: Any, regions: Any, **_: Any) -> list[float]:
        rows = zip(completions, label, regions, strict=True)
        return [localization_reward(c[0]["content"], y, boxes) for c, y, boxes in rows]

    return [form, letter, place]


# ----------------------------------------------------------------------------------------------------------------------


def draw(count: int) -> dict[str, list[Any]]:
    """Columns as TRL gives them to a reward function: groups of completions, of one image each."""
    rng = random.Random(0)
    columns: dict[str, list[Any]] = {"completions": [], "label": [], "regions": [], "frame": []}
    while len(columns["label"]) < count:
        label = "anomalous" if rng.random() < 0.5 else "normal"
        truth = [_box(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))] if label == "anomalous" else []
        group: list[str] = []
        while len(group) < GROUP:
            group.append(rng.choice(group) if group and rng.random() < AGAIN else _completion(rng, truth))
        columns["completions"] += [[{"role": "assistant", "content": text}] for text in group]
        columns["label"] += [label] * GROUP
        columns["regions"] += [truth] * GROUP
        columns["frame"] += [[SIDE, SIDE]] * GROUP
    return {name: values[:count] for name, values in columns.items()}


def _box(rng: random.Random) -> list[float]:
    x, y = rng.randrange(0, 440), rng.randrange(0, 440)
    return [float(x), float(y), float(x + rng.randrange(8, 70)), float(y + rng.randrange(8, 70))]


def _completion(rng: random.Random, truth: list[list[float]]) -> str:
    kind = rng.choices(list(KINDS), KINDS.values())[0]
    guesses = [[v + rng.randrange(-12, 13) for v in box] if rng.random() < 0.6 else _box(rng) for box in truth]
    guesses = [[max(0.0, v) for v in box] for box in guesses] or [_box(rng)]
    if rng.random() < 0.3:
        guesses.append(_box(rng))
    regions = [] if kind == "no box" else [Box(*box) for box in guesses]
    verdict = "anomalous" if rng.random() < 0.5 else "normal"
    text = prompt.target_completion(verdict, regions, "scratch")  # type: ignore[arg-type]
    text = text.replace("<think>", "<think>" + "".join(rng.sample(PROSE, 2)))
    text = text.replace("<rethink>", "<rethink>" + rng.choice(PROSE))
    if kind == "cut":
        return text[: text.index("<rethink>") + 40]
    if kind == "words":
        return text.replace("<answer>A", "<answer>abnormal").replace("<answer>B", "<answer>normal")
    return re.sub(r"</?\w+>", "", text) if kind == "bare" else text


def timed(scorers: dict[str, list[Any]], columns: dict[str, list[Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """Rewards of each term, and completions a second, by scorer; they take turns, a step each, at the same machine."""
    count = len(columns["label"])
    rewards: dict[str, list[list[float]]] = {name: [[] for _ in functions] for name, functions in scorers.items()}
    seconds = dict.fromkeys(scorers, 0.0)
    for at in range(0, count, STEP):
        step = {name: values[at : at + STEP] for name, values in columns.items()}
        for name, functions in scorers.items():
            start = time.process_time()
            scored = [function(**step) for function in functions]
            seconds[name] += time.process_time() - start
            for term, values in zip(rewards[name], scored, strict=True):
                term += values
    return rewards, {name: count / took for name, took in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=100_000)
    count = parser.parse_args().completions
    columns = draw(count)
    texts = [completion[0]["content"] for completion in columns["completions"]]
    mix = ", ".join(f"{kind} {share:.0%}" for kind, share in KINDS.items())
    print(f"{count} completions of {sum(map(len, texts)) / count:.0f} characters: {mix};")
    print(f"steps of {STEP}, groups of {GROUP}, {AGAIN:.0%} repeat another of their group, {len(set(texts))} differ")
    scorers = {"plain": plain_functions()} | {name: trainer.reward_functions(name) for name in ("paper", "calibrated")}
    timed(scorers, draw(STEP))
    rewards, rates = timed(scorers, columns)
    for name, rate in rates.items():
        print(f"{name:10}  {rate:9.0f} completions/s, {rate / rates['plain']:.2f} times")
    published = np.array(rewards["paper"])[: len(rewards["plain"])]
    worst = float(np.abs(published - np.array(rewards["plain"])).max())
    print(f"largest difference of a term of `paper`: {worst:.1e}")
    return int(min(rates["paper"], rates["calibrated"]) < LEAST * rates["plain"] or worst > 1e-6)


if __name__ == "__main__":
    raise SystemExit(main())
