"""What the best answer that does not depend on the image earns, against answers of a model that looks.

python benchmarks/blind.py                      # the tables of docs/experiments.md
python benchmarks/blind.py --profile paper
python benchmarks/blind.py --weight localization=2    # a term by another weight than in the default run

A blind policy writes completions without regard to the image. What it earns is an average over the completions that it
writes, so no mixture of completions earns more than the best of them: the search is for one completion. It goes through
families of them (each letter, no letter, broken form; no box, the whole image, grids, one box drawn again and again)
and improves sets of one to four boxes by hill climbing; all by seed. Truth is drawn:

- scattered: one to three defects of any place, sides log-uniform from 4 % to 50 % of the image;
- central: the same, with centres near the middle of the image, as on most photographs of products;
- one place: every image with the same one box. To box it is to know the data set, and no reward of single images can
  tell that from looking; so the table shows this case, and the tests leave it out.

Two models that look are compared. Both box every defect with an IoU of 0.3, and one region of each normal image:

- fixed: the letter is right on 77 % of the images of either label, whatever the share;
- weighing: the same evidence (a normal distribution for each label, AUROC 0.85), with the threshold that earns the most
  at this share.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

from adfm.method.coordinates import PUBLISHED
from adfm.method.rewards import PROFILES
from adfm.method.terms import WEIGHTS
from adfm.records import Box, Label

SIDE = PUBLISHED.width
SHARES = tuple(round(0.05 * k, 2) for k in range(1, 20))
LETTER_RIGHT, IOU = 0.77, 0.3

Truth = Sequence[Sequence[Box]]
Score = Callable[[str, Label, Sequence[Box]], float]


class Earnings(NamedTuple):
    """Mean total reward of a policy on images of either label."""

    anomalous: float
    normal: float

    def at(self, share: float) -> float:
        """The mean where this share of the images is anomalous."""
        return share * self.anomalous + (1 - share) * self.normal


def draw(place: str, images: int, seed: int) -> list[list[Box]]:
    """True boxes of anomalous images, in the published frame; `place` is one of the docstring's."""
    rng = random.Random(seed)
    if place == "one place":
        return [[Box(200, 160, 280, 220)]] * images

    def box() -> Box:
        width, height = (SIDE * 0.04 * 12.5 ** rng.random() for _ in range(2))
        spread = [rng.random() if place == "scattered" else rng.gauss(0.5, 0.15) for _ in range(2)]
        x, y = (min(1.0, max(0.0, s)) * (SIDE - side) for s, side in zip(spread, (width, height), strict=True))
        return Box(*(float(round(v)) for v in (x, y, x + width, y + height)))

    return [[box() for _ in range(rng.choice((1, 1, 1, 2, 3)))] for _ in range(images)]


def completion(boxes: Sequence[Box], letter: str) -> str:
    """A completion of three stages."""
    regions = " ".join(f"[{b[0]:g}, {b[1]:g}, {b[2]:g}, {b[3]:g}]" for b in boxes)
    return f"<think>See {regions or 'nothing'}.</think><rethink>Looked at again.</rethink><answer>{letter}</answer>"


NOTHING_STANDS_OUT = (
    "<think>The surface is even, nothing stands out.</think><rethink>Something is wrong all the same.</rethink>"
    "<answer>A</answer>"
)


def families() -> Iterator[str]:
    """Constant completions that one would think of."""
    yield NOTHING_STANDS_OUT
    whole = Box(0, 0, SIDE, SIDE)
    regions: list[list[Box]] = [[], [whole], [whole] * 2, [whole] * 4]
    for cells in (2, 3, 4, 6):
        side = SIDE / cells
        regions.append(
            [Box(i * side, j * side, (i + 1) * side, (j + 1) * side) for i in range(cells) for j in range(cells)]
        )
    for share in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        low, high = SIDE * (1 - share) / 2, SIDE * (1 + share) / 2
        regions += [[Box(low, low, high, high)] * times for times in (1, 2)]
    for boxes in regions:
        for letter in ("A", "B", "", "A or B", "normal", "abnormal"):
            text = completion(boxes, letter)
            yield text
            yield text.replace("<rethink>Looked at again.</rethink>", "")
    for letter in ("A", "B", ""):
        yield letter
        yield f"<answer>{letter}</answer>"
        yield f"<think>[nan, 1, 2, 3] [9, 9, 1, 1]</think><rethink>x</rethink><answer>{letter}</answer>"


def earnings(score: Score, text: str, truth: Truth) -> Earnings:
    """What a constant completion earns."""
    return Earnings(fmean(score(text, "anomalous", boxes) for boxes in truth), score(text, "normal", []))


def search(score: Score, truth: Truth, seed: int, steps: int = 60) -> dict[str, Earnings]:
    """Constant completions, and what each earns: the families, and the best that hill climbing comes to.

    Args:
        score: Total reward of a completion.
        truth: True boxes of each anomalous image.
        seed: Seeds the climb.
        steps: Changes tried for each number of boxes.
    """
    rng = random.Random(seed)
    tried = {text: earnings(score, text, truth) for text in families()}

    def localized(boxes: Sequence[Box]) -> float:
        text = completion(boxes, "A")
        return fmean(score(text, "anomalous", true) for true in truth)

    def anywhere() -> Box:
        if rng.random() < 0.5:  # where defects of other images are is what a blind policy can learn
            return rng.choice(rng.choice(truth))
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(round(SIDE) + 1), 2)) for _ in range(2))
        return Box(x1, y1, x2, y2)

    def moved(box: Box) -> Box:
        x1, y1, x2, y2 = (min(SIDE, max(0.0, round(v + rng.gauss(0, SIDE / 16)))) for v in box)
        return Box(x1, y1, x2, y2) if x1 < x2 and y1 < y2 else box

    # The letter decides what boxes earn on normal images, and the share how much that counts. Climbing for A on
    # anomalous images alone therefore serves both letters: on normal images each further box costs or is free.
    for count in (1, 2, 3, 4):
        best = max(([anywhere() for _ in range(count)] for _ in range(steps // 3)), key=localized)
        height = localized(best)
        for _ in range(steps):
            k = rng.randrange(count)
            other = [*best[:k], moved(best[k]) if rng.random() < 0.8 else anywhere(), *best[k + 1 :]]
            if (reached := localized(other)) > height:
                best, height = other, reached
        tried |= {text: earnings(score, text, truth) for text in (completion(best, letter) for letter in "AB")}
    return tried


def best_blind(tried: dict[str, Earnings], share: float) -> tuple[str, float]:
    """The best of constant completions at a share of anomalous images, and what it earns."""
    text = max(tried, key=lambda text: tried[text].at(share))
    return text, tried[text].at(share)


def looking(score: Score, truth: Truth) -> dict[str, Earnings]:
    """What a model earns that boxes with an IoU of `IOU`, by the letter that it answers."""
    region = Box(40, 40, 90, 90)

    def beside(box: Box) -> Box:
        # Two boxes of one size overlap by an IoU of i if they share 2i / (1 + i) of their width.
        step = (box.x2 - box.x1) * (1 - 2 * IOU / (1 + IOU))
        return Box(box.x1 + step, box.y1, box.x2 + step, box.y2)

    return {
        letter: Earnings(
            fmean(score(completion([beside(b) for b in true], letter), "anomalous", true) for true in truth),
            score(completion([region], letter), "normal", []),
        )
        for letter in "AB"
    }


def perfect(score: Score, truth: Truth) -> Earnings:
    """What the right letter with exactly the true boxes earns."""
    return Earnings(
        fmean(score(completion(true, "A"), "anomalous", true) for true in truth),
        score(completion([], "B"), "normal", []),
    )


def fixed(by_letter: dict[str, Earnings]) -> Earnings:
    """A model whose letter is right with the same probability on either label."""
    a, b = by_letter["A"], by_letter["B"]
    right, wrong = LETTER_RIGHT, 1 - LETTER_RIGHT
    return Earnings(right * a.anomalous + wrong * b.anomalous, right * b.normal + wrong * a.normal)


def weighing(by_letter: dict[str, Earnings], share: float) -> float:
    """The same with the threshold that earns the most at this share."""
    a, b = by_letter["A"], by_letter["B"]
    unit = NormalDist()
    half = unit.inv_cdf(LETTER_RIGHT)  # evidence is N(half, 1) on anomalous images, N(-half, 1) on normal ones

    def earned(threshold: float) -> float:
        recall, false_alarms = 1 - unit.cdf(threshold - half), 1 - unit.cdf(threshold + half)
        return Earnings(
            recall * a.anomalous + (1 - recall) * b.anomalous,
            false_alarms * a.normal + (1 - false_alarms) * b.normal,
        ).at(share)

    return max(earned(step / 50) for step in range(-300, 301))


def described(text: str) -> str:
    """Letter and number of boxes of a completion, for the table."""
    if text == NOTHING_STANDS_OUT:
        return "A, nothing stands out"
    letter = text.partition("<answer>")[2].partition("</answer>")[0] or "no letter"
    return f"{letter}, {text.count('[') or 'no'} box{'' if text.count('[') == 1 else 'es'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="calibrated")
    parser.add_argument("--weight", action="append", default=[], metavar="TERM=WEIGHT", help="of the reward's terms")
    parser.add_argument("--images", type=int, default=300, help="anomalous images to draw")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reward = PROFILES[args.profile]
    given = dict(setting.split("=") for setting in args.weight)
    weights = WEIGHTS._replace(**{term: float(weight) for term, weight in given.items()})

    def score(text: str, label: Label, boxes: Sequence[Box]) -> float:
        return reward(text, label, boxes).weighted(weights)

    for place in ("scattered", "central", "one place"):
        truth = draw(place, args.images, args.seed)
        tried = search(score, truth, args.seed)
        by_letter, best = looking(score, truth), perfect(score, truth)
        constant = tried[NOTHING_STANDS_OUT]
        print(f"\n{place}: {len(tried)} constant completions of {args.images} anomalous images\n")
        print("| share | best blind completion | earns | nothing stands out, A | fixed | weighing | perfect |")
        print("|---|---|---|---|---|---|---|")
        for share in SHARES:
            text, blind = best_blind(tried, share)
            print(
                f"| {share:.2f} | {described(text)} | {blind:.3f} | {constant.at(share):.3f} | "
                f"{fixed(by_letter).at(share):.3f} | {weighing(by_letter, share):.3f} | {best.at(share):.3f} |"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
