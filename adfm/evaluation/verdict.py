"""Verdict in words: the kind of model, its comparison with the references, and the next steps.

`adfm check` prints the kind of a model before anything is trained (`expected`). An evaluation ends with `summarize`,
which is kept as `summary` in `references.json`.
"""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from adfm.data.tiles import Proposal
from adfm.evaluation import metrics, references
from adfm.evaluation.metrics import with_limits, written
from adfm.models import families, loading, model_folder
from adfm.params import Model
from adfm.records import FEW
from adfm.text import printable

_WIDE = 0.1  # half of an interval from which on a rate is too uncertain to act on
_GAP = 0.1  # between recall and specificity, from which on the lower one is named
_LONG = 600  # steps of cold start in params/photographs.yaml
_KIND = 0.1  # by which a kind's recall is below the whole's, from which on the kind is named


class Larger(NamedTuple):
    """A larger language model, with the figures of the tables in docs/training.md ("Memory and time")."""

    name: str  # its `model.name`
    overlay: str  # its settings
    weights: float  # memory of its weights in GiB, two bytes each
    memory: float  # most GPU memory in training, in GiB
    hours: tuple[int, int]  # of all steps of GRPO on an A100 and on an H100


LARGER = (
    Larger("Qwen/Qwen2.5-VL-3B-Instruct", "params/qwen2.5-vl-3b.yaml", 7.0, 25.5, (5, 2)),
    Larger("Qwen/Qwen2.5-VL-7B-Instruct", "params/qwen2.5-vl-7b.yaml", 15.4, 44.3, (10, 4)),
    Larger("Qwen/Qwen3-VL-8B-Instruct", "params/qwen3-vl-8b.yaml", 16.3, 55.3, (10, 4)),
)


@dataclass(frozen=True)
class Kind:
    """The kind of a model."""

    base: str  # name of the base model; empty for a reference detector
    embedded: bool = False  # whether the base is the embedded model
    features: bool = False  # whether it sees the frozen features of a pretrained network, whose weights do not count
    weights: int = 0  # numbers in the files of the base
    pixels: int = 0  # most pixels that it sees of an image, or of a tile
    trained: bool = False  # whether it has an adapter
    images: tuple[int, int] | None = None  # normal and anomalous, that it was trained on; `None`: other data
    cut: int | None = None  # steps after which `sft.steps` ended its cold start too early, by `adfm.json`


class Part(NamedTuple):
    """A kind of defect: its defective test images, those of them that are flagged, and its images in train."""

    images: int
    flagged: int
    train: int


def parts(table: pd.DataFrame, train: pd.DataFrame) -> dict[str, Part]:
    """Count the kinds of defects of a prediction table, and in `train`, which has columns `label` and `defect`."""
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
    """The results of an evaluation that the verdict follows from."""

    kind: Kind  # of the candidate
    compared: Mapping[str, Any]  # the contents of `references.json`
    metrics: Mapping[str, Any]  # the candidate's, with `threshold` and `<metric>_at_threshold` where it has one
    # Candidate minus reference detector by metric, with limits; empty without a detector.
    difference: Mapping[str, Any] = field(default_factory=dict)
    detector: str = ""  # folder of the reference detector, which may be the candidate itself
    train: tuple[int, int] = (0, 0)  # normal and anomalous images in train
    images: int = 0  # of the whole data set
    kinds: Mapping[str, Part] = field(default_factory=dict)  # by name of the defect, as the candidate decides
    tiles: Proposal | None = None  # a tile size that makes small defects visible
    limit: tuple[str, float] | None = None  # the setting that chose the threshold, and its value
    crossed: Mapping[str, Any] | None = None  # the contents of `cross-validation.json`
    shards: str = "data/shards"  # for a command


def kind_of(
    model: str | Path, settings: Model, fingerprint: str | None = None, train: tuple[int, int] | None = None
) -> Kind:
    """Read the kind of a local or hub model, or of a detector's folder, from its files, without its weights.

    `fingerprint` and `train`, normal and anomalous images, are of shards that it may have been trained on.

    Raises:
        AdfmError: As of `loading.load_processor`.
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
    """Describe a base model before it is trained, and the next larger one; `memory` is that of training, in bytes."""
    needs = f"about {memory / 2**30:.1f} GiB to train it on a GPU, computed from tensor sizes, not measured"
    if kind.embedded:
        expect = (
            "runs on a CPU, for a first result and for small sets; it writes letter and boxes in a fixed form and "
            "explains nothing beyond them. docs/evidence.md has what it reached on photographs, with "
            "params/photographs.yaml; the report compares yours with a reference detector and the blind answers"
        )
        needs += "; docs/index.md has what `make repro` took on two cores"
    else:
        expect = (
            "for a GPU; docs/training.md says what was checked of such a model, and that no real weights were trained. "
            "The report compares yours with a reference detector and the blind answers"
        )
    lines = {"kind": _what(kind), "expect": expect, "memory": needs, "larger": _larger(kind)}
    return [f"{name:10}{text}" for name, text in lines.items() if text]


def _what(kind: Kind) -> str:
    side = math.isqrt(kind.pixels)
    weights = f"{kind.weights / 1e9:.1f} billion" if kind.weights >= 1e9 else f"{kind.weights / 1e6:.1f} million"
    name = "the embedded model" if kind.embedded else printable(kind.base)
    weights += " weights on frozen pretrained features" if kind.features else " weights"
    return f"{name} ({weights}; sees about {side} x {side} pixels)"


def _larger(kind: Kind) -> str:
    """The next model that is clearly larger, with its documented memory and hours; empty if there is none."""
    for larger in LARGER:
        if larger.weights * 2**30 / 2 > 1.5 * kind.weights:
            return (
                f"{larger.name} ({larger.overlay}), about {larger.memory:.1f} GiB of GPU memory and {larger.hours[1]} "
                f"h on an H100, {larger.hours[0]} h on an A100: computed estimates of docs/training.md, not measured"
            )
    return ""


def _model(facts: Facts) -> str:
    kind, candidate = facts.kind, facts.compared["candidate"]
    trained = "trained on other data than these"
    if kind.images is not None:
        trained = f"trained on {sum(kind.images):,} images, {kind.images[1]:,} of them defective"
    if not kind.base:
        return f"{candidate} is a reference detector, without language, {trained}."
    return f"{candidate} is {_what(kind)}, {f'with an adapter {trained}' if kind.trained else 'not trained'}."


def summarize(facts: Facts) -> dict[str, Any]:
    """Write the verdict on a candidate.

    Returns `model`, a sentence; `comparison`, sentences; `steps`, the one or two next steps, each with the `rule` that
    chose it and a `text`.
    """
    blind, sentence = _blind(facts)
    comparison = [sentence, facts.compared["sentence"], _boxes(facts), _named_kinds(facts), _crossed(facts)]
    steps = [{"rule": rule, "text": text} for rule, text in islice(_steps(facts, blind), 2)]
    return {"model": _model(facts), "comparison": [text for text in comparison if text], "steps": steps}


def _blind(facts: Facts) -> tuple[str, str]:
    """Whether the candidate is `better` or `worse` than the best blind answer, `open` or `none`; and a sentence."""
    # As with the reference detector: by score where a threshold could be chosen on validation, else as written.
    rows, name = facts.compared["rows"], facts.compared["candidate"]
    row = rows[name]
    by_score = row[references.BY_SCORE][0] is not None
    value, low, high = row[references.BY_SCORE if by_score else "balanced_accuracy"]
    if value is None:
        return _blind_of_one_label(facts)
    best = max(rows[blind]["balanced_accuracy"][0] for blind in references.BLIND)
    figures = f"balanced accuracy {'by score' if by_score else 'as written'} {written(value, low, high)}"
    against = f"{figures}, blind {best:.3f}"
    if low is not None and low > best:
        sentence = f"{name} is better than a blind answer: {against}."
        for title, (rate, lowest, highest) in (
            ("Its letters as written are", row["balanced_accuracy"]),
            ("Its decisions at the threshold are", with_limits(facts.metrics, "balanced_accuracy_at_threshold")),
        ):
            if by_score and lowest is not None and lowest <= best:
                sentence += f" {title} not shown to be: {written(rate, lowest, highest)}."
        return "better", sentence
    if high is not None and high < best:
        return "worse", f"{name} is worse than a blind answer: {against}."
    return "open", f"{name} is not shown to be better than a blind answer: {against}."


def _blind_of_one_label(facts: Facts) -> tuple[str, str]:
    """As `_blind`, by boxes: a blind answer has none."""
    name, measured = facts.compared["candidate"], facts.metrics
    value, low, high = facts.compared["rows"][name]["iou"]
    if not measured["anomalous"]:
        start = f"No test image is defective, and always B is right on all {measured['normal']:,}"
        return "none", f"{start}: nothing tells {name} from a blind answer."
    start = f"All {measured['anomalous']:,} test images are defective, and always A is right on all of them"
    if value is None:
        return "none", f"{start}; none has boxes: nothing tells {name} from a blind answer."
    if low is not None and low > 0:
        return "better", f"{start}; {name} locates them with IoU {written(value, low, high)}, a blind answer not."
    return "open", f"{start}; {name} is not shown to locate them: IoU {written(value, low, high)}."


def _boxes(facts: Facts) -> str:
    """Write the IoU of candidate and detector, where the comparison in words is by their letters."""
    compared = facts.compared
    name, detector = compared["candidate"], compared["detector"]
    value, low, high = with_limits(facts.difference, "iou")
    if detector is None or compared.get("metric") == "iou":
        return ""
    ours, theirs = (compared["rows"][each]["iou"][0] for each in (name, detector))
    if value is None or ours is None or theirs is None:
        return ""
    verdict = "the two cannot be told apart"
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = f"{name if low > 0 else 'the detector'} is better"
    lowest, highest = (None, None) if low is None or high is None else (-high, -low)
    change = written(-value, lowest, highest, "+")  # detector minus candidate
    return f"By IoU {verdict}: {theirs:.3f} (detector) and {ours:.3f} ({name}), difference {change}."


def _named_kinds(facts: Facts) -> str:
    rows, name, detector = (facts.compared[key] for key in ("rows", "candidate", "detector"))
    value, low, high = rows[name][metrics.KIND]
    if value is None:
        return ""
    others = f"always the commonest {rows['always_A'][metrics.KIND][0]:.3f}"
    if detector is not None and (right := rows[detector][metrics.KIND][0]) is not None:
        others = f"detector {right:.3f}, {others}"
    return f"{name} names the kind right in {written(value, low, high)} of the defective images ({others})."


def _crossed(facts: Facts) -> str:
    if not (crossed := facts.crossed):
        return ""
    for at, end in (("at the threshold", "_at_threshold"), ("as written", "")):
        balanced = crossed["metrics"][f"balanced_accuracy{end}"]
        if balanced["value"] is not None:
            figures = f"{at} {written(balanced['value'], balanced['low'], balanced['high'])}"
            start = "Cross-validation of the same settings: balanced accuracy"
            return f"{start} {figures} on all {crossed['images']:,} images."
    return ""


def _steps(facts: Facts, blind: str) -> Iterator[tuple[str, str]]:
    """Yield the rule and text of each step that is due, the most urgent first."""
    kind, measured = facts.kind, facts.metrics
    detector = facts.compared["verdict"] == "detector" or (blind == "better" and not kind.base)
    both = measured["normal"] > 0 and measured["anomalous"] > 0
    if not both:
        missing, present = ("normal", "defective") if not measured["normal"] else ("defective", "normal")
        text = f"Add {missing} images to the test split: all {measured['images']:,} are {present}, so that nothing"
        yield "labels", f"{text} shows whether the letter depends on the image."
    if kind.embedded and kind.cut:
        more = f", or `make repro PARAMS=params/photographs.yaml`, which allows {_LONG}" if kind.cut < _LONG else ""
        text = f"Train longer: sft.steps={kind.cut} ended the cold start while it was still learning; raise it"
        yield "longer", f"{text}{more}."
    if blind in ("open", "worse"):
        yield "look", _look(facts)
    if detector:
        command = f"adfm predict --model {shlex.quote(printable(facts.detector))} IMAGES"
        larger = f" Or try a larger model: {_larger(kind)}." if kind.base and _larger(kind) else ""
        yield "detector", f"Use the reference detector now: `{command}`.{larger}"
    if tile := facts.tiles:
        text = f"Cut the images: set tile.size={tile.size} and train again. A quarter of the defects are less than "
        text += f"{tile.now:.1f} pixels wide or high in what the model sees; in tiles that is {tile.then:.1f}."
        cost = f"{tile.tiles} tiles an image take about {tile.tiles} times the time in evaluation and use."
        yield "tiles", f"{text} {cost}"
    if both and (text := _lower_rate(facts)):
        yield "rate", text
    if both and not detector and (text := _more_images(facts)):
        yield "images", text
    if blind == "better" and not detector:
        plan = f"`adfm gate --plan {shlex.quote(printable(facts.shards))}` says how many test images the policy needs."
        text = "Register it (`make repro` does): the gate judges it by your policy, and a person approves it."
        yield "gate", f"{text} {plan}"


def _look(facts: Facts) -> str:
    normal, anomalous = facts.train
    images = f"{normal:,} normal and {anomalous:,} defective images"
    if facts.kind.base and not facts.kind.trained:
        return f"Train it (`make repro`): it is a base model, and there are {images} to train on."
    text = "Stop and look: check labels and boxes with `adfm show`, and the escapes in the report. "
    text += f"There were {images} to train on."
    row = facts.compared["rows"][facts.compared["candidate"]]
    value, low, _ = row[references.BY_SCORE] if row[references.BY_SCORE][0] is not None else row["balanced_accuracy"]
    best = 0.5  # the balanced accuracy of every blind answer
    if value is not None and low is not None and value > best >= low:
        # The half width of an interval falls as one over the square root of the number of images.
        tested = facts.metrics["images"]
        needed = math.ceil(tested * ((value - low) / (value - best)) ** 2)
        if needed <= 100 * tested:
            text += f" If {value:.3f} is true, about {needed:,} test images would tell (now {tested:,})."
    return text


def _lower_rate(facts: Facts) -> str:
    """Write which of recall and specificity is much the lower one, beyond chance, and the remedy; empty if none is."""
    rates = metrics.rates(facts.metrics)
    if len(rates) < 2:
        return ""
    lower, higher = sorted(rates, key=lambda name: rates[name])
    if rates[higher][0] - rates[lower][0] < _GAP or rates[lower][2] >= rates[higher][1]:
        return ""
    at = "as written" if facts.metrics.get("threshold") is None else "at the threshold"
    figures = f"{lower.capitalize()} {at} is {written(*rates[lower])}, {higher} {written(*rates[higher])}"
    moved = ""
    if facts.limit:
        name, value = facts.limit
        raises = (name == "evaluate.overkill_limit") == (lower == "recall")
        moved = f", or {'raise' if raises else 'lower'} {name} ({value:g} now), which sets the threshold"
    if lower == "recall":
        if worst := _worst(facts, rates["recall"][0]):
            return f"{figures}: add images of {worst[1]} to train on, {worst[0]}{moved}."
        images = f"defective images to train on ({facts.train[1]:,} now)"
        return f"{figures}: add {images}, and look at the escapes in the report{moved}."
    look = "look at the good parts that are flagged (gallery overkill of the report) and add normal images"
    return f"{figures}: {look} like them to train on ({facts.train[0]:,} now){moved}."


def _worst(facts: Facts, recall: float) -> tuple[str, str] | None:
    """Return the kind of defect that is missed most, in figures, and its name; `None` if none is well below."""
    if len(facts.kinds) < 2:
        return None
    name, part = min(facts.kinds.items(), key=lambda each: (each[1].flagged / each[1].images, each[1].train, each[0]))
    figures = f"of which {part.flagged:,} of {part.images:,} are flagged in test, with {part.train:,} in train"
    return (figures, printable(name)) if part.flagged / part.images <= recall - _KIND else None


def _more_images(facts: Facts) -> str:
    """Write which images would make the least certain rate certain enough; empty if none is too uncertain."""
    rates = metrics.rates(facts.metrics)
    if len(rates) < 2:
        return ""
    wide = {name: (high - low) / 2 for name, (_, low, high) in rates.items()}
    name = max(wide, key=lambda each: wide[each])
    # Candidate and detector may also not be told apart because the interval of their difference is wide.
    _, low, high = facts.compared.get("difference") or (None, None, None)
    wide_difference = low is not None and high is not None and (high - low) / 2 > _WIDE / 2
    if wide[name] <= _WIDE and not (facts.compared["verdict"] == "open" and wide_difference):
        return ""
    label = "defective" if name == "recall" else "normal"
    images = facts.metrics["anomalous" if name == "recall" else "normal"]
    value, half = rates[name][0], wide[name]
    _, needed = metrics.images_needed(value, half, images, half / 2)
    at = "as written" if facts.metrics.get("threshold") is None else "at the threshold"
    known = f"{name} {at}, {value:.3f}, is known to ± {half:.3f} with {images:,}"
    text = f"Add {label} test images: {known}; about {needed:,} would halve that."
    if name == "recall" and (worst := _worst(facts, value)):
        text += f" First of {worst[1]}, {worst[0]}."
    if not facts.crossed and facts.images < FEW:
        text += f" Or set evaluate.folds=5, which judges each of the {facts.images:,} images once."
    return text
