"""Words for images and defects: normal (OK, good), anomalous (NG, bad), or the name of a defect (scratch)."""

from collections.abc import Iterable

# The words for a whole image, in lower case and without what separates words.
NORMAL = frozenset(("normal", "good", "ok", "pass", "passed", "nodefect", "nodefects", "defectfree", "nondefective"))
ANOMALOUS = frozenset(
    ("anomalous", "anomaly", "anomalies", "abnormal", "defective", "defect", "defects", "faulty", "bad", "ng", "ko")
).union(("nok", "notok", "nogood", "notgood", "fail", "failed", "reject", "rejected"))
_SEPARATORS = str.maketrans("", "", "-_. ")


def core(word: str) -> str:
    """Normalise a word as in `NORMAL` and `ANOMALOUS`: `No defect` and `no_defect` are `nodefect`."""
    return word.strip().lower().translate(_SEPARATORS)


def is_normal(word: str) -> bool:
    """Whether a word says that an image is normal."""
    return core(word) in NORMAL


def is_anomalous(word: str) -> bool:
    """Whether a word says that an image is anomalous, without naming the defect."""
    return core(word) in ANOMALOUS


def is_verdict(answer: object) -> bool:
    """Whether an answer says that an image is normal or that it is not."""
    return isinstance(answer, str) and (is_normal(answer) or is_anomalous(answer))


def class_name(value: object) -> str:
    """Check the name of a defect's class: refuse what is not a name, or says that nothing is wrong."""
    name = value.strip() if isinstance(value, str) else ""
    if not name or not name.isprintable():
        raise ValueError(f"the class {value!r} is not a name")
    if is_normal(name):
        remedy = "delete the shapes of this class, an image without any is normal"
        raise ValueError(f"its class is {name!r}, but every shape is taken for a defect; {remedy}")
    return name


def defect_type(answers: Iterable[str]) -> str | None:
    """Return the defect that the answers about an image name; "" if they say that it is normal, `None` without any.

    Several names are in alphabetical order, joined by `+`; it is "defect" where no type is named.
    """
    given = {answer.strip() for answer in answers if answer.strip()}
    defects = sorted(answer for answer in given if not is_normal(answer))
    if defects and len(defects) < len(given):
        raise ValueError(f"the image is labelled both normal and not: {', '.join(sorted(given))}")
    types = [class_name(answer) for answer in defects if not is_anomalous(answer)]
    return "+".join(types) or ("defect" if defects else "" if given else None)
