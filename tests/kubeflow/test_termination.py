"""The termination message of a container."""

from pathlib import Path

import pytest

from adfm.kubeflow import termination


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination-log"
    monkeypatch.setattr(termination, "FILE", path)
    return path


def test_the_first_line_is_left_and_replaces_an_earlier_one(file: Path) -> None:
    file.write_text("an earlier line that is much longer than the one that comes now")
    termination.leave("\n  val: 3 of 5 expectations fail\x1b[2J\nsee the report")
    assert file.read_text() == "val: 3 of 5 expectations fail\\x1b[2J"


def test_what_the_first_line_introduces_is_left_with_it(file: Path) -> None:
    file.touch()
    termination.leave("Version 3 cannot be promoted:\n  - its gate failed\n  - nobody approved it\n")
    assert file.read_text() == "Version 3 cannot be promoted: its gate failed; nobody approved it"


def test_it_fits_what_kubernetes_keeps(file: Path) -> None:
    file.touch()
    termination.leave("ü" * 10_000)
    assert 1000 <= len(file.read_bytes()) <= 4096


@pytest.mark.parametrize("text", ["", "\n", "a \udcff name"])
def test_no_text_makes_it_fail(file: Path, text: str) -> None:
    file.touch()
    termination.leave(text)
    assert "\n" not in file.read_text()


def test_outside_a_pod_no_file_is_made(file: Path) -> None:
    termination.leave("no such place")
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(termination, "FILE", tmp_path)
    termination.leave("a folder is no file")
