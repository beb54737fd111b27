import io
import json
import math
from pathlib import Path

import pytest

from adfm.errors import AdfmError
from adfm.method.rewards import PROFILES
from adfm.method.score import score_file
from adfm.records import Box

VECTORS = Path(__file__).with_name("vectors.jsonl")
GOOD = {
    "completion": "<think>[1,2,3,4]</think><rethink>x</rethink><answer>A</answer>",
    "label": "anomalous",
    "boxes": [[1, 2, 3, 4]],
}


def scores(path, profile):
    out = io.StringIO()
    score_file(path, profile, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_line_is_scored_in_order(profile):
    cases = [json.loads(line) for line in VECTORS.read_text("utf-8").splitlines()]
    lines = scores(VECTORS, profile)
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        terms = PROFILES[profile](case["completion"], case["label"], [Box(*box) for box in case["boxes"]])
        assert line == {**terms._asdict(), "total": terms.total}
        assert list(line) == ["format", "classification", "localization", "regions", "total"]
        assert all(map(math.isfinite, line.values()))


def test_lines_may_end_anyhow_and_hold_any_text(tmp_path):
    path = tmp_path / "completions.jsonl"
    cases = [GOOD, {**GOOD, "completion": "\u2028\x85\ud800\x00 [nan,inf,1e999,-1]"}, {**GOOD, "more": None}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(case) for case in cases).encode())
    assert [line["total"] for line in scores(path, "calibrated")] == [3.0, 0.0, 3.0]
    path.write_text(json.dumps({**GOOD, "completion": "a\u2028\x85b"}, ensure_ascii=False), "utf-8")
    assert len(scores(path, "paper")) == 1


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"boxes": ' + "9" * 5000 + "}", "not JSON"),
    ("[1]", "not a JSON object"),
    ("{}", "lacks completion, label, boxes"),
    (json.dumps({**GOOD, "completion": None}), "completion is not text"),
    (json.dumps({**GOOD, "label": "odd"}), "label 'odd'"),
    (json.dumps({**GOOD, "label": ["normal"]}), "label"),
    (json.dumps({**GOOD, "boxes": None}), "boxes is not a list"),
    (json.dumps({**GOOD, "boxes": [1, 2, 3, 4]}), "box 1 is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[1, 2, 3]]}), "is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[1, 2, 3, "4"]]}), "is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[0, 0, True, True]]}), "is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[0, 0, math.nan, 1]]}), "is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[0, 0, math.inf, 1]]}), "is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[0, 0, 10**400, 1]]}), "is not four numbers"),
    (json.dumps({**GOOD, "boxes": [[3, 2, 1, 4]]}), "has no area"),
]


def test_bad_lines_are_all_named_and_nothing_is_printed(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), *(line for line, _ in BAD)]))
    out = io.StringIO()
    with pytest.raises(AdfmError) as error:
        score_file(path, "calibrated", out)
    assert out.getvalue() == ""
    head, *listed = str(error.value).split("\n")
    assert "bad.jsonl" in head
    assert f"{len(BAD)} of {len(BAD) + 1} lines" in head
    for number, (line, (_, reason)) in enumerate(zip(listed, BAD, strict=True), 2):
        assert line.startswith(f"  line {number}: ")
        assert reason in line


def test_what_is_no_file_of_lines(tmp_path):
    with pytest.raises(AdfmError, match="missing.jsonl: cannot be read"):
        scores(tmp_path / "missing.jsonl", "paper")
    with pytest.raises(AdfmError, match="cannot be read"):
        scores(tmp_path, "paper")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(AdfmError, match="not text"):
        scores(tmp_path / "image.png", "paper")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(AdfmError, match="no lines"):
        scores(tmp_path / "empty.jsonl", "paper")


def test_an_unknown_profile_is_named_with_the_known_ones():
    with pytest.raises(AdfmError, match="'published'.*calibrated, paper"):
        scores(VECTORS, "published")
