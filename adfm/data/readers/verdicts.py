"""Labels of whole images, as people write them into annotation tools: OK, NG, good, scratch."""

from __future__ import annotations

from collections.abc import Iterable

from adfm.data.readers.annotations import class_name

_NORMAL = frozenset(("normal", "good", "ok", "pass", "no defect"))
_DEFECTIVE = frozenset(
    ("anomalous", "anomaly", "abnormal", "defective", "defect", "bad", "ng", "ko", "nok", "fail", "not ok")
)


def is_verdict(answer: object) -> bool:
    """Whether an answer says that an image is normal or is not, as opposed to anything else about it."""
    return isinstance(answer, str) and answer.strip().lower() in _NORMAL | _DEFECTIVE


def defect_type(answers: Iterable[str]) -> str | None:
    """The defect that the answers about an image name; "" if they say that it is normal, `None` without any.

    Of several, the names by the alphabet, joined by `+`; "defect" where no type is named.

    Raises:
        ValueError: They say both that it is normal and that it is not, or one is not a name.
    """
    given = {answer.strip() for answer in answers if answer.strip()}
    defects = sorted(answer for answer in given if answer.lower() not in _NORMAL)
    if defects and len(defects) < len(given):
        raise ValueError(f"the image is labelled both normal and not: {', '.join(sorted(given))}")
    types = [class_name(answer) for answer in defects if answer.lower() not in _DEFECTIVE]
    return "+".join(types) or ("defect" if defects else "" if given else None)
