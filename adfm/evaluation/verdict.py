"""Plain verdicts: what kind of model this is, how it compares with its references, and what to do next.

`adfm check` prints what a model is before anything is trained (`expected`). An evaluation ends with `summarize`, which
is kept as `summary` in `references.json`: `model`, a sentence; `comparison`, sentences; `steps`, the one or two next
steps, each with the `rule` that chose it and a `text`.

All figures are of the evaluation itself, but for those of `LARGER`, which are documented, and named as such.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adfm import statistics
from adfm.data.tiles import Proposal
from adfm.evaluation import metrics, references
from adfm.models import families, loading, model_folder
from adfm.params import Model
from adfm.text import printable

if TYPE_CHECKING:
    import pandas as pd

FEW = 200
"""Images of a data set below which cross-validation is proposed; that of `adfm.data.folds`."""

_WIDE = 0.1  # half of an interval from which on a rate is too uncertain to act on
_GAP = 0.1  # between recall and specificity, from which on the lower one is named
_LONG = 600  # steps of cold start in params/photographs.yaml
_KIND = 0.1  # by which a kind's recall is below the whole's, from which on the kind is named


class Larger(NamedTuple):
    """A larger language model, with the figures of the tables in docs/training.md ("Memory and time").

    Args:
        name: Its `model.name`.
        overlay: Its settings.
        weights: Memory of its weights in GiB, two bytes each.
        memory: Most GPU memory in training, in GiB.
        hours: Of all steps of GRPO on an A100 and on an H100.
    """

    name: str
    overlay: str
    weights: float
    memory: float
    hours: tuple[int, int]


LARGER = (
    Larger("Qwen/Qwen2.5-VL-3B-Instruct", "params/qwen2.5-vl-3b.yaml", 7.0, 25.5, (5, 2)),
    Larger("Qwen/Qwen2.5-VL-7B-Instruct", "params/qwen2.5-vl-7b.yaml", 15.4, 44.3, (10, 4)),
    Larger("Qwen/Qwen3-VL-8B-Instruct", "params/qwen3-vl-8b.yaml", 16.3, 55.3, (10, 4)),
)


@dataclass(frozen=True)
class Kind:
    """What kind of model it is.

    Args:
        base: Name of the base model; empty for a reference detector.
        embedded: Whether the base is the embedded model.
        features: Whether it looks through the frozen features of a pretrained network, whose weights are not counted.
        weights: Numbers in the files of the base.
        pixels: Most pixels that it sees of an image, or of a tile.
        trained: Whether it is more than the base: it has an adapter.
        images: Normal and anomalous images that it was trained on; `None` if it was on other data.
        cut: Steps after which `sft.steps` ended its cold start too early, as `adfm.json` says.
    """

    base: str
    embedded: bool = False
    features: bool = False
    weights: int = 0
    pixels: int = 0
    trained: bool = False
    images: tuple[int, int] | None = None
    cut: int | None = None


class Part(NamedTuple):
    """A kind of defect: its defective test images, those of them that are flagged, and its images in train."""

    images: int
    flagged: int
    train: int


def parts(table: pd.DataFrame, train: pd.DataFrame) -> dict[str, Part]:
    """The kinds of defects of a prediction table with decisions, or letters where there are none.

    Args:
        table: Prediction table.
        train: `label` and `defect` of the images in train.
    """
    decided = metrics.as_decided(table)
    defective = decided[(decided["label"] == "anomalous") & decided["defect"].notna()]
    flagged = defective["predicted"] == "anomalous"
    known = train["defect"][train["label"] == "anomalous"].value_counts()
    return {
        str(name): Part(len(rows), int(flagged[rows.index].sum()), int(known.get(name, 0)))
        for name, rows in defective.groupby("defect", sort=True)
    }


@dataclass(frozen=True)
class Facts:
    """What an evaluation knows.

    Args:
        kind: Of the candidate.
        compared: The contents of `references.json`.
        metrics: The candidate's metrics, with `threshold` and `<metric>_at_threshold` where there is a threshold.
        difference: Candidate minus reference detector by metric, with limits; empty without a detector.
        detector: Folder of the reference detector, which may be the candidate itself.
        train: Normal and anomalous images in train.
        images: Images of the whole data set.
        kinds: By name of the defect, as the candidate decides.
        tiles: A tile size that makes small defects visible, if there is one.
        limit: The setting that chose the threshold, as `evaluate.overkill_limit`, and its value.
        crossed: The contents of `cross-validation.json`, if there was one.
        shards: The shards, for a command.
    """

    kind: Kind
    compared: Mapping[str, Any]
    metrics: Mapping[str, Any]
    difference: Mapping[str, Any] = field(default_factory=dict)
    detector: str = ""
    train: tuple[int, int] = (0, 0)
    images: int = 0
    kinds: Mapping[str, Part] = field(default_factory=dict)
    tiles: Proposal | None = None
    limit: tuple[str, float] | None = None
    crossed: Mapping[str, Any] | None = None
    shards: str = "data/shards"


# ------------------------------------------------------------------------------------------------ kind of model


def kind_of(
    model: str | Path, settings: Model, fingerprint: str | None = None, train: tuple[int, int] | None = None
) -> Kind:
    """The kind of a local or hub model, read from its files without its weights.

    Args:
        model: Any model that `adfm.models.loading` loads, or the folder of a reference detector.
        settings: Reads `revision` and `max_pixels`.
        fingerprint: Of shards that it may have been trained on.
        train: Their normal and anomalous images in train.

    Raises:
        AdfmError: As `loading.load_processor`.
    """
    from adfm.tiny import tower

    description = model_folder.describe(Path(model))
    same = description is not None and fingerprint is not None and description.get("data_fingerprint") == fingerprint
    images = train if same else None
    if model_folder.is_detector(model):
        return Kind("", images=images)
    base, folder = loading.base_of(model, settings)
    family = model_folder.family_of(folder)
    processor = loading.load_processor(model, settings)
    features = family == tower.FAMILY
    return Kind(
        base.name,
        embedded=features or base.name in loading.EMBEDDED,
        features=features,
        weights=model_folder.parameters(folder),
        pixels=families.get(family).images.max_pixels(processor.image_processor.to_dict()),
        trained=description is not None,
        images=images,
        cut=(description or {}).get("cut_short"),
    )


def expected(kind: Kind, memory: int) -> list[str]:
    """What is known of a model before it is trained: its kind, what to expect, its memory, the next larger one.

    Args:
        kind: Of the base model.
        memory: Bytes of GPU memory that training needs, by `adfm.models.hardware`.
    """
    if kind.embedded:
        expect = (
            "runs on a CPU, for a first result and for small sets; it writes letter and boxes in a fixed form and "
            "explains nothing beyond them. docs/evidence.md has what it reached on photographs, with "
            "params/photographs.yaml; the report compares yours with a reference detector and the blind answers"
        )
    else:
        expect = (
            "for a GPU; docs/training.md says what was checked of such a model, and that no real weights were trained. "
            "The report compares yours with a reference detector and the blind answers"
        )
    needs = f"about {memory / 2**30:.1f} GiB to train it on a GPU, computed from tensor sizes, not measured"
    if kind.embedded:
        needs += "; docs/index.md has what `make repro` took on two cores"
    lines = [f"kind      {_what(kind)}", f"expect    {expect}", f"memory    {needs}"]
    if larger := _larger(kind):
        lines.append(f"larger    {larger}")
    return lines


def _what(kind: Kind) -> str:
    side = math.isqrt(kind.pixels)
    weights = f"{kind.weights / 1e9:.1f} billion" if kind.weights >= 1e9 else f"{kind.weights / 1e6:.1f} million"
    name = "the embedded model" if kind.embedded else printable(kind.base)
    weights += " weights on frozen pretrained features" if kind.features else " weights"
    return f"{name} ({weights}; sees about {side} x {side} pixels)"


def _larger(kind: Kind) -> str:
    """The next model that is clearly larger, with the memory and hours that are documented; empty if there is none."""
    for larger in LARGER:
        if larger.weights * 2**30 / 2 > 1.5 * kind.weights:
            return (
                f"{larger.name} ({larger.overlay}), about {larger.memory:.1f} GiB of GPU memory and {larger.hours[1]} "
                f"h on an H100, {larger.hours[0]} h on an A100: computed estimates of docs/training.md, not measured"
            )
    return ""


def _model(facts: Facts) -> str:
    kind, candidate = facts.kind, facts.compared["candidate"]
    trained = "on other data than these"
    if kind.images is not None:
        trained = f"on {sum(kind.images):,} images, {kind.images[1]:,} of them defective"
    if not kind.base:
        return f"{candidate} is a reference detector, without language, trained {trained}."
    return f"{candidate} is {_what(kind)}, {f'with an adapter trained {trained}' if kind.trained else 'not trained'}."


# ---------------------------------------------------------------------------------------------------- comparison


def summarize(facts: Facts) -> dict[str, Any]:
    """The verdict on a candidate: `model`, `comparison` and `steps`, as the module says."""
    blind, sentence = _blind(facts)
    comparison = [sentence, facts.compared["sentence"], _boxes(facts), _named_kinds(facts), _crossed(facts)]
    steps = [{"rule": rule, "text": text} for rule, text in _steps(facts, blind)]
    return {"model": _model(facts), "comparison": [text for text in comparison if text], "steps": steps}


def _blind(facts: Facts) -> tuple[str, str]:
    """Whether the candidate is `better` or `worse` than the best blind answer, `open` or `none`; and a sentence.

    Letters are compared as with the reference detector: by score where a threshold could be chosen on validation, else
    as written. Where all images are defective, a blind answer has no box, and boxes are compared.
    """
    rows, name = facts.compared["rows"], facts.compared["candidate"]
    row = rows[name]
    by_score = row[references.BY_SCORE][0] is not None
    value, low, high = row[references.BY_SCORE if by_score else "balanced_accuracy"]
    if value is None:
        return _blind_of_one_label(facts)
    best = max(rows[blind]["balanced_accuracy"][0] for blind in references.BLIND)
    figures = f"balanced accuracy {'by score' if by_score else 'as written'} {_interval(value, low, high)}"
    against = f"{figures}, blind {best:.3f}"
    if low is not None and low > best:
        words = f"{name} is better than a blind answer: {against}."
        decided = [facts.metrics.get(f"balanced_accuracy_at_threshold{end}") for end in ("", "_low", "_high")]
        for title, (rate, lowest, highest) in (
            ("Its letters as written are", row["balanced_accuracy"]),
            ("Its decisions at the threshold are", decided),
        ):
            if by_score and rate is not None and lowest is not None and lowest <= best:
                words += f" {title} not shown to be: {_interval(rate, lowest, highest)}."
        return "better", words
    if high is not None and high < best:
        return "worse", f"{name} is worse than a blind answer: {against}."
    return "open", f"{name} is not shown to be better than a blind answer: {against}."


def _blind_of_one_label(facts: Facts) -> tuple[str, str]:
    name, measured = facts.compared["candidate"], facts.metrics
    value, low, high = facts.compared["rows"][name]["iou"]
    if not measured["anomalous"]:
        return "none", (
            f"No test image is defective, and always B is right on all {measured['normal']:,}: nothing tells {name} "
            "from a blind answer."
        )
    start = f"All {measured['anomalous']:,} test images are defective, and always A is right on all of them"
    if value is None:
        return "none", f"{start}; none has boxes: nothing tells {name} from a blind answer."
    if low is not None and low > 0:
        return "better", f"{start}; {name} locates them with IoU {_interval(value, low, high)}, a blind answer not."
    return "open", f"{start}; {name} is not shown to locate them: IoU {_interval(value, low, high)}."


def _boxes(facts: Facts) -> str:
    """IoU of candidate and detector, where the comparison in words is by their letters."""
    compared = facts.compared
    name, detector = compared["candidate"], compared["detector"]
    value, low, high = (facts.difference.get(f"iou{end}") for end in ("", "_low", "_high"))
    if detector is None or compared.get("metric") == "iou" or value is None:
        return ""
    ours, theirs = (compared["rows"][each]["iou"][0] for each in (name, detector))
    if ours is None or theirs is None:
        return ""
    verdict = "the two cannot be told apart"
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = f"{name if low > 0 else 'the detector'} is better"
    change = _interval(-value, _minus(high), _minus(low), "+")
    return f"By IoU {verdict}: {theirs:.3f} (detector) and {ours:.3f} ({name}), difference {change}."


def _named_kinds(facts: Facts) -> str:
    """How often the candidate names the kind right, beside detector and blind answer; empty without kinds."""
    rows, name, detector = (facts.compared[key] for key in ("rows", "candidate", "detector"))
    value, low, high = rows[name][metrics.KIND]
    if value is None:
        return ""
    others = f"always the commonest {rows['always_A'][metrics.KIND][0]:.3f}"
    if detector is not None and (right := rows[detector][metrics.KIND][0]) is not None:
        others = f"detector {right:.3f}, {others}"
    return f"{name} names the kind right in {_interval(value, low, high)} of the defective images ({others})."


def _crossed(facts: Facts) -> str:
    if not facts.crossed:
        return ""
    measured = facts.crossed["metrics"]
    at = next((at for at in ("_at_threshold", "") if measured[f"balanced_accuracy{at}"]["value"] is not None), None)
    if at is None:
        return ""
    balanced = measured[f"balanced_accuracy{at}"]
    return (
        f"Cross-validation of the same settings: balanced accuracy {_at(bool(at))} "
        f"{_interval(balanced['value'], balanced['low'], balanced['high'])} on all {facts.crossed['images']:,} images."
    )


# ---------------------------------------------------------------------------------------------------- next steps


def _steps(facts: Facts, blind: str) -> list[tuple[str, str]]:
    """One or two next steps, the most urgent first."""
    detector = facts.compared["verdict"] == "detector" or (blind == "better" and not facts.kind.base)
    both = facts.metrics["normal"] > 0 and facts.metrics["anomalous"] > 0
    steps = [] if both else [("labels", _one_label(facts))]
    if facts.kind.embedded and facts.kind.cut:
        steps.append(("longer", _longer(facts.kind.cut)))
    if blind in ("open", "worse"):
        steps.append(("look", _look(facts)))
    if detector:
        steps.append(("detector", _use_detector(facts)))
    if facts.tiles:
        steps.append(("tiles", _cut(facts.tiles)))
    if both and (text := _lower_rate(facts)):
        steps.append(("rate", text))
    if both and not detector and (text := _more_images(facts)):
        steps.append(("images", text))
    if blind == "better" and not detector:
        steps.append(("gate", _register(facts)))
    return steps[:2]


def _one_label(facts: Facts) -> str:
    missing, present = ("normal", "defective") if not facts.metrics["normal"] else ("defective", "normal")
    return (
        f"Add {missing} images to the test split: all {facts.metrics['images']:,} are {present}, so that nothing shows "
        "whether the letter depends on the image."
    )


def _longer(cut: int) -> str:
    more = (
        f"raise it, or `make repro PARAMS=params/photographs.yaml`, which allows {_LONG}" if cut < _LONG else "raise it"
    )
    return f"Train longer: sft.steps={cut} ended the cold start while it was still learning; {more}."


def _look(facts: Facts) -> str:
    normal, anomalous = facts.train
    images = f"{normal:,} normal and {anomalous:,} defective images"
    if facts.kind.base and not facts.kind.trained:
        return f"Train it (`make repro`): it is a base model, and there are {images} to train on."
    text = (
        "Stop and look: check labels and boxes with `adfm show`, and the escapes in the report. There were "
        f"{images} to train on."
    )
    row = facts.compared["rows"][facts.compared["candidate"]]
    value, low, _ = row[references.BY_SCORE] if row[references.BY_SCORE][0] is not None else row["balanced_accuracy"]
    best = 0.5  # the balanced accuracy of every blind answer
    if value is not None and low is not None and value > best >= low:
        # The half width of an interval falls as one over the square root of the number of images.
        images = facts.metrics["images"]
        needed = math.ceil(images * ((value - low) / (value - best)) ** 2)
        if needed <= 100 * images:
            text += f" If {value:.3f} is true, about {needed:,} test images would tell (now {images:,})."
    return text


def _use_detector(facts: Facts) -> str:
    command = f"adfm predict --model {shlex.quote(printable(facts.detector))} IMAGES"
    larger = _larger(facts.kind) if facts.kind.base else ""
    return f"Use the reference detector now: `{command}`." + (f" Or try a larger model: {larger}." if larger else "")


def _cut(proposal: Proposal) -> str:
    return (
        f"Cut the images: set tile.size={proposal.size} and train again. A quarter of the defects are less than "
        f"{proposal.now:.1f} pixels wide or high in what the model sees; in tiles that is {proposal.then:.1f}. "
        f"{proposal.tiles} tiles an image take about {proposal.tiles} times the time in evaluation and use."
    )


def _rates(facts: Facts) -> dict[str, tuple[float, float, float]]:
    """Recall and specificity with their limits, at the threshold where there is one; empty if one is not measured."""
    at = "_at_threshold" if facts.metrics.get("threshold") is not None else ""
    rates = {}
    for name, error in (("recall", "miss_rate"), ("specificity", "overkill")):
        value, low, high = (facts.metrics.get(f"{error}{at}{end}") for end in ("", "_low", "_high"))
        if value is None or low is None or high is None:
            return {}
        rates[name] = 1 - value, 1 - high, 1 - low
    return rates


def _lower_rate(facts: Facts) -> str:
    """Which of recall and specificity is much the lower one, beyond chance, and what to do about it; empty if none."""
    rates = _rates(facts)
    if not rates:
        return ""
    lower, higher = sorted(rates, key=lambda name: rates[name])
    if rates[higher][0] - rates[lower][0] < _GAP or rates[lower][2] >= rates[higher][1]:
        return ""
    at = _at(facts.metrics.get("threshold") is not None)
    words = f"{lower.capitalize()} {at} is {_interval(*rates[lower])}, {higher} {_interval(*rates[higher])}: "
    moved = ""
    if facts.limit:
        name, value = facts.limit
        raises = (name == "evaluate.overkill_limit") == (lower == "recall")
        moved = f", or {'raise' if raises else 'lower'} {name} ({value:g} now), which sets the threshold"
    if lower == "recall":
        worst = _worst(facts, rates["recall"][0])
        images = f"defective images to train on ({facts.train[1]:,} now)"
        kind = f"images of {worst[1]} to train on, " if worst else f"{images}, "
        return f"{words}add {kind}{worst[0] if worst else 'and look at the escapes in the report'}{moved}."
    return (
        f"{words}look at the good parts that are flagged (gallery overkill of the report) and add normal images like "
        f"them to train on ({facts.train[0]:,} now){moved}."
    )


def _worst(facts: Facts, recall: float) -> tuple[str, str] | None:
    """The kind of defect that is missed most, in figures, and its name; `None` where none is well below the whole."""
    if len(facts.kinds) < 2:
        return None
    name, part = min(facts.kinds.items(), key=lambda each: (each[1].flagged / each[1].images, each[1].train, each[0]))
    if part.flagged / part.images > recall - _KIND:
        return None
    figures = f"of which {part.flagged:,} of {part.images:,} are flagged in test, with {part.train:,} in train"
    return figures, printable(name)


def _more_images(facts: Facts) -> str:
    """Which images would make the least certain rate as certain as it should be; empty if none is too uncertain."""
    rates = _rates(facts)
    wide = {name: (high - low) / 2 for name, (_, low, high) in rates.items()}
    name = max(wide, key=lambda each: wide[each], default="")
    if not name or (wide[name] <= _WIDE and not _wide_difference(facts.compared)):
        return ""
    label = "defective" if name == "recall" else "normal"
    images = facts.metrics["anomalous" if label == "defective" else "normal"]
    value, half = rates[name][0], wide[name]
    parts = min(images, statistics.images_for_half_width(value, half + 1e-6))  # as `metrics.more_images`
    needed = math.ceil(statistics.images_for_half_width(value, half / 2) * images / parts)
    text = (
        f"Add {label} test images: {name} {_at(facts.metrics.get('threshold') is not None)}, {value:.3f}, is known to "
        f"± {half:.3f} with {images:,}; about {needed:,} would halve that."
    )
    if name == "recall" and (worst := _worst(facts, value)):
        text += f" First of {worst[1]}, {worst[0]}."
    if not facts.crossed and facts.images < FEW:
        text += f" Or set evaluate.folds=5, which judges each of the {facts.images:,} images once."
    return text


def _wide_difference(compared: Mapping[str, Any]) -> bool:
    """Whether candidate and detector cannot be told apart because the interval of their difference is wide."""
    _, low, high = compared.get("difference") or (None, None, None)
    return compared["verdict"] == "open" and low is not None and high is not None and (high - low) / 2 > _WIDE / 2


def _register(facts: Facts) -> str:
    return (
        "Register it (`make repro` does): the gate judges it by your policy, and a person approves it. `adfm gate "
        f"--plan {shlex.quote(printable(facts.shards))}` says how many test images the policy needs."
    )


# ------------------------------------------------------------------------------------------------------- figures


def _at(threshold: bool) -> str:
    return "at the threshold" if threshold else "as written"


def _interval(value: float, low: float | None, high: float | None, sign: str = "") -> str:
    text = format(value, f"{sign}.3f")
    return text if low is None or high is None else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _minus(value: float | None) -> float | None:
    return None if value is None else -value
