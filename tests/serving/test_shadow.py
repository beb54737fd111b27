from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adfm.cli import main
from adfm.errors import AdfmError
from adfm.serving import servelog, server, shadow, verified
from adfm.serving.shadow import Shadow, Turns


def row(label: str, *boxes: list[float], probability: float | None = 0.5) -> dict[str, Any]:
    return {
        "label": label,
        "probability": probability,
        "threshold": 0.4,
        "boxes": list(boxes),
        "reasoning": "…",
        "reason": None,
    }


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """The lines that were logged."""
    monkeypatch.setenv("ADFM_SERVE_LOG", str(tmp_path / "log"))
    return lambda: list(servelog.read([tmp_path / "log"])) if (tmp_path / "log").exists() else []


def by_content(contents: list[bytes]) -> list[dict[str, Any]]:
    return [row(content.decode()) for content in contents]


# ------------------------------------------------------------------------------------------------------------ the queue


def test_differences_are_logged_with_both_answers(log: Any) -> None:
    candidate = Shadow(by_content, Turns(), "adfm/7", "adfm/8")
    candidate.offer([b"normal", b"anomalous"], [row("normal"), row("normal", probability=0.1)])
    candidate.wait()
    entries = log()
    assert sum(entry["images"] for entry in entries if entry["event"] == "compared") == 2
    [differs] = [entry for entry in entries if entry["event"] == "differs"]
    assert differs.pop("time").endswith("+00:00")
    assert differs == {
        "event": "differs",
        "version": "adfm/7",
        "candidate": "adfm/8",
        "image": hashlib.sha256(b"anomalous").hexdigest(),
        "in": "label",
        "production": {"label": "normal", "probability": 0.1, "boxes": [], "reason": None},
        "shadow": {"label": "anomalous", "probability": 0.5, "boxes": [], "reason": None},
    }


def test_a_shadow_that_is_behind_drops_images_and_delays_nothing(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free, batches = threading.Event(), []

    def slow(contents: list[bytes]) -> list[dict[str, Any]]:
        batches.append(len(contents))
        assert free.wait(30)
        return by_content(contents)

    candidate = Shadow(slow, Turns(), "adfm/7", "adfm/8")
    candidate.offer([b"normal"], [row("normal")])
    while not batches:
        time.sleep(0.001)
    start = time.monotonic()
    for _ in range(100):
        candidate.offer([b"normal"] * 2, [row("normal")] * 2)
    assert time.monotonic() - start < 5
    free.set()
    candidate.wait()
    counts = {event: sum(e["images"] for e in log() if e["event"] == event) for event in ("compared", "dropped")}
    assert counts == {"compared": 1 + shadow._MOST_IMAGES, "dropped": 200 - shadow._MOST_IMAGES}
    assert max(batches) <= shadow._AT_ONCE


def test_large_files_that_wait_are_bounded(log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_MOST_BYTES", 20)
    candidate = Shadow(by_content, Turns(), "adfm/7", "adfm/8")
    candidate.offer([b"x" * 21], [row("normal")])
    for _ in range(5):
        candidate.offer([b"normal" * 3], [row("normal" * 3)])
        candidate.wait()
    counts = {event: sum(e["images"] for e in log() if e["event"] == event) for event in ("compared", "dropped")}
    assert counts == {"compared": 5, "dropped": 1}


def test_a_shadow_that_fails_is_logged_and_tried_again(log: Any) -> None:
    failing = iter([True, False])

    def answer(contents: list[bytes]) -> list[dict[str, Any]]:
        if next(failing):
            raise RuntimeError("CUDA out of memory")
        return by_content(contents)

    candidate = Shadow(answer, Turns(), "adfm/7", "adfm/8")
    for _ in range(2):
        candidate.offer([b"normal"], [row("normal")])
        candidate.wait()
    events = [(entry["event"], entry["images"], entry.get("reason")) for entry in log()]
    assert events == [("failed", 1, "RuntimeError: CUDA out of memory"), ("compared", 1, None)]


def test_an_answer_too_few_is_a_failure(log: Any) -> None:
    candidate = Shadow(lambda contents: [], Turns(), "adfm/7", "adfm/8")
    candidate.offer([b"normal"], [row("normal")])
    candidate.wait()
    assert [entry["event"] for entry in log()] == ["failed"]


# ---------------------------------------------------------------------------------------------------------- whose turn


def test_requests_go_before_the_shadow_and_nobody_computes_at_the_same_time() -> None:
    turns, order, computing = Turns(), [], []

    def work(name: str, turn: Callable[[], Any]) -> None:
        with turn():
            computing.append(name)
            assert len(computing) == 1
            order.append(name)
            time.sleep(0.005)
            computing.pop()

    with turns.production():
        threads = [threading.Thread(target=work, args=("shadow", turns.shadow)) for _ in range(3)]
        threads += [threading.Thread(target=work, args=("production", turns.production)) for _ in range(5)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while turns._requests < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert order == ["production"] * 5 + ["shadow"] * 3


def test_a_turn_ends_with_an_error() -> None:
    turns = Turns()
    for turn in (turns.production, turns.shadow):
        with pytest.raises(ZeroDivisionError), turn():
            raise ZeroDivisionError
    with turns.production():
        pass


# --------------------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("production", "other", "where"),
    [
        (row("normal"), row("normal", probability=0.1), None),
        (row("normal"), row("cannot judge"), "label"),
        (row("anomalous", [0, 0, 10, 10]), row("anomalous", [0, 0, 10, 9]), None),
        (row("anomalous", [0, 0, 10, 10]), row("anomalous", [0, 0, 10, 4]), "boxes"),
        (row("anomalous", [0, 0, 10, 10], [20, 20, 30, 30]), row("anomalous", [20, 20, 30, 30]), None),  # IoU 0.5
        (row("anomalous", [0, 0, 10, 10]), row("anomalous"), "boxes"),
        (row("anomalous"), row("anomalous", [0, 0, 10, 10]), "boxes"),
        (row("anomalous"), row("anomalous"), None),
    ],
)
def test_where_two_answers_differ(production: dict[str, Any], other: dict[str, Any], where: str | None) -> None:
    assert shadow.difference(production, other) == where
    assert shadow.difference(other, production) == where


sides = st.floats(0, 5000)
boxes = st.lists(
    st.tuples(sides, sides, sides, sides).map(
        lambda s: [min(s[0], s[2]), min(s[1], s[3]), max(s[0], s[2]), max(s[1], s[3])]
    ),
    max_size=4,
)


@given(boxes, boxes)
def test_any_boxes_can_be_compared(own: list[list[float]], others: list[list[float]]) -> None:
    assert shadow.difference(row("anomalous", *own), row("anomalous", *others)) in (None, "boxes")


# ------------------------------------------------------------------------------------------------------------- the log


def test_the_log_is_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        monkeypatch.setenv("ADFM_SERVE_LOG", str(tmp_path / name))
        servelog.write(
            [
                ("answered", {"labels": {"normal": 1000, "anomalous": 20, "cannot judge": 4}}),
                *[
                    ("cannot judge", {"image": "0" * 64, "kind": kind, "reason": "…"})
                    for kind in ("far", "far", "size")
                ],
                ("compared", {"images": 500, "differ": 2}),
                *[
                    (
                        "differs",
                        {
                            "image": f"{number:064}",
                            "in": "label",
                            "production": row("normal"),
                            "shadow": row("anomalous"),
                        },
                    )
                    for number in range(2)
                ],
                ("dropped", {"images": 7}),
            ],
            "adfm/7",
        )
    with (tmp_path / "b").open("a") as file:
        file.write('{"event": "answered", "la')  # a line that was being written
    assert main(["served", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:11] == [
        "images answered 2,048",
        "normal 2,000 97.66%",
        "anomalous 40 1.95%",
        "cannot judge 8 0.39%",
        "why they cannot be judged",
        "far 4 0.20%",
        "size 2 0.10%",
        "images of the shadow 1,000",
        "normal, shadow anomalous 4 0.40%",
        "dropped 14",
        "latest differences (time, SHA-256 of the image's file)",
    ]
    assert len(lines) == 15 and lines[-1].endswith(f"{1:064} normal, shadow anomalous")


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", "{}", '{"event": 3}', '{"event": "answered"}', '{"event": "answered", "labels": []}',
     '{"event": "differs", "production": 3}', '{"event": "compared", "images": "x"}'],
)  # fmt: skip
def test_a_file_that_is_no_log(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_text(f"{line}\n")
    assert main(["served", str(tmp_path / "log")]) == 2
    assert "is not a line of a log that ADFM_SERVE_LOG names" in capsys.readouterr().err


def test_a_log_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["served", str(tmp_path / "log")]) == 2
    assert "log cannot be read" in capsys.readouterr().err


def test_nothing_from_a_log_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    entry = {"event": "cannot judge", "kind": "\x1b[2J", "time": "", "version": ""}
    assert "\x1b" not in servelog.summary([entry])


def test_without_a_file_only_what_is_out_of_the_ordinary_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [("answered", {"labels": {"normal": 1}}), ("cannot judge", {"image": "0", "kind": "far", "reason": "…"})]
    monkeypatch.delenv("ADFM_SERVE_LOG", raising=False)
    servelog.check()
    servelog.write(events, "adfm/7")
    [line] = capsys.readouterr().err.splitlines()
    assert json.loads(line)["kind"] == "far"
    monkeypatch.setenv("ADFM_SERVE_LOG", str(tmp_path / "nowhere" / "log"))  # its disk went away
    servelog.write(events, "adfm/7")
    first, second = capsys.readouterr().err.splitlines()
    assert "cannot be written" in first and json.loads(second)["kind"] == "far"


def test_many_writers_share_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADFM_SERVE_LOG", str(tmp_path / "log"))

    def write() -> None:
        for _ in range(50):
            servelog.write([("answered", {"labels": {"normal": 1}})] * 3, "adfm/7")

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(entry["labels"]["normal"] for entry in servelog.read([tmp_path / "log"])) == 8 * 50 * 3


# ----------------------------------------------------------------------------------------------------------- adfm serve


def test_a_shadow_is_verified_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder that the environment names, which nobody has verified, is not loaded."""
    folders: list[str | None] = []

    def fetch(model: str, to: Path) -> tuple[Path, str]:
        if model == "models:/adfm/9":
            raise AdfmError("models:/adfm/9 is not what was signed")
        return to / model.rpartition("/")[2], f"{model} verified"

    monkeypatch.setenv(shadow.FOLDER, "/unverified")
    monkeypatch.setattr(verified, "fetch", fetch)
    monkeypatch.setattr(server, "_run", lambda *arguments: folders.append(os.environ.get(shadow.FOLDER)))
    assert main(["serve", "models:/adfm/7", "--port", "0", "--shadow", "models:/adfm/8"]) == 0
    assert main(["serve", "models:/adfm/7", "--port", "0"]) == 0
    assert main(["serve", "models:/adfm/7", "--port", "0", "--shadow", "models:/adfm/9"]) == 1
    assert [folder and Path(folder).name for folder in folders] == ["8", None]
