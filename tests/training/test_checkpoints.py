from __future__ import annotations

from pathlib import Path

import pytest

from adfm.training import checkpoints


def write(work: Path, step: int) -> None:
    folder = checkpoints.partial(work) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(str(step))


def publish(work: Path, window: int | None, *steps: int) -> list[int]:
    for step in steps:
        write(work, step)
        checkpoints.publish(work, window)
    return checkpoints.every(work)


def test_training_does_not_resume_from_an_unfinished_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.last(tmp_path) is None
    publish(tmp_path, 0, 9, 10)
    write(tmp_path, 11)
    assert checkpoints.last(tmp_path) == tmp_path / "checkpoint-10"
    assert "an unfinished checkpoint is removed" in capsys.readouterr().out
    assert not checkpoints.partial(tmp_path).exists()


def test_one_checkpoint_from_before_the_window_is_kept(tmp_path: Path) -> None:
    assert publish(tmp_path / "a", 0, 1, 2, 3, 4) == [3, 4]
    assert publish(tmp_path / "b", 3, *range(1, 10)) == [5, 7, 8, 9]
    assert publish(tmp_path / "c", 25, 25, 50, 75, 100) == [50, 75, 100]
    assert publish(tmp_path / "d", None, 1, 2, 3) == [1, 2, 3]


def test_later_checkpoints_are_dropped(tmp_path: Path) -> None:
    publish(tmp_path, None, 1, 2, 3)
    assert checkpoints.drop_after(tmp_path, 2) == tmp_path / "checkpoint-2"
    assert checkpoints.drop_after(tmp_path, 0) is None


def test_a_step_that_is_repeated_replaces_its_checkpoint(tmp_path: Path) -> None:
    publish(tmp_path, 0, 1)
    (tmp_path / "checkpoint-1" / "stale").touch()
    assert publish(tmp_path, 0, 1) == [1]
    assert not (tmp_path / "checkpoint-1" / "stale").exists()


def test_differences_name_the_keys() -> None:
    one = {"seed": 0, "train": {"steps": 4, "weights": {"format": 1.0}}, "data": "a" * 64}
    other = {"seed": 0, "train": {"steps": 5, "weights": {"format": 1.0}}, "data": "b" * 64}
    assert checkpoints.differences(one, other) == ["train.steps (4, now 5)", "data"]
    assert checkpoints.differences(one, one) == []
