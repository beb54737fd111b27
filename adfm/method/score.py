"""Score a file of completions with the reward."""

import json
from pathlib import Path
from typing import TextIO, cast

from adfm.errors import AdfmError
from adfm.method.coordinates import PUBLISHED
from adfm.method.rewards import PROFILES
from adfm.records import Box, Label


def score_file(path: str | Path, profile: str, out: TextIO) -> None:
    """Score a file of JSON lines and print one JSON object a line: each of `Terms`, and `total`.

    Nothing is printed unless every line can be scored.

    Args:
        path: JSON lines, each with `completion` (text), `label` (`normal` or `anomalous`) and `boxes` (ground truth,
            `[x1, y1, x2, y2]` in a frame of 504 x 504, as `PUBLISHED`); other keys and empty lines are skipped.
        profile: A key of `adfm.method.rewards.PROFILES`.
        out: The stream to print to.

    Raises:
        AdfmError: The profile is unknown, the file cannot be read, or lines of it cannot: every one is listed.
    """
    if profile not in PROFILES:
        raise AdfmError(f"reward profile {profile!r} is unknown; choose one of: {', '.join(PROFILES)}")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise AdfmError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None
    except UnicodeDecodeError:
        raise AdfmError(f"{path}: is not text in UTF-8; give a file of JSON lines") from None
    cases, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                cases.append(_case(line))
            except AdfmError as error:
                bad.append(f"  line {number}: {error}")
    if bad:
        raise AdfmError(
            f"{path}: {len(bad)} of {len(bad) + len(cases)} lines cannot be scored; fix or remove them:\n"
            + "\n".join(bad)
        )
    if not cases:
        raise AdfmError(f"{path}: holds no lines to score")
    for completion, label, boxes in cases:
        terms = PROFILES[profile](completion, label, boxes, PUBLISHED)
        print(json.dumps({**terms._asdict(), "total": terms.total}), file=out)


def _case(line: str) -> tuple[str, Label, list[Box]]:
    try:
        case = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AdfmError(f"not JSON ({error})") from None
    if not isinstance(case, dict):
        raise AdfmError("not a JSON object")
    if missing := [key for key in ("completion", "label", "boxes") if key not in case]:
        raise AdfmError(f"lacks {', '.join(missing)}")
    completion, label, boxes = case["completion"], case["label"], case["boxes"]
    if not isinstance(completion, str):
        raise AdfmError("completion is not text")
    if label not in ("normal", "anomalous"):
        raise AdfmError(f"label {label!r} is neither normal nor anomalous")
    if not isinstance(boxes, list):
        raise AdfmError("boxes is not a list")
    return completion, cast(Label, label), [_box(box) for box in boxes]


def _box(box: object) -> Box:
    numbers = box if isinstance(box, list) and len(box) == 4 else []
    # Bounded, not merely finite: a number that no float holds is caught as well.
    if not numbers or not all(type(number) in (int, float) and abs(number) < 1e9 for number in numbers):
        raise AdfmError(f"box {box!r} is not four numbers")
    x1, y1, x2, y2 = map(float, numbers)
    if not (x1 < x2 and y1 < y2):
        raise AdfmError(f"box {box!r} has no area; boxes are [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return Box(x1, y1, x2, y2)
