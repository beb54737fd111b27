import json
import os
from pathlib import Path

import pytest

from adfm.errors import AdfmError
from adfm.files import atomic_folder, refuse_to_replace, replace_json, replacing, walk


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _finish(out: Path, text: str) -> None:
    with atomic_folder(out) as folder:
        (folder / "metrics.json").write_text(text)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with atomic_folder(out) as folder:
        (folder / "metrics.json").write_text("1")
        assert not out.exists()
    assert (out / "metrics.json").read_text() == "1"
    assert _names(out.parent) == ["b"]


def test_an_earlier_result_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finish(out, "1")
    (out / "more").write_text("gone with it")
    _finish(out, "2")
    assert [path.name for path in out.iterdir()] == ["metrics.json"]
    assert (out / "metrics.json").read_text() == "2"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_earlier_result_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    _finish(out, "1")
    with pytest.raises(error), atomic_folder(out) as folder:
        (folder / "metrics.json").write_text("half")
        raise error
    assert (out / "metrics.json").read_text() == "1"
    assert _names(tmp_path) == ["out"]


def test_a_stale_partial_folder_is_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left").write_text("by a killed process")
    _finish(tmp_path / "out", "1")
    assert _names(tmp_path / "out") == ["metrics.json"]


def test_a_partial_folder_that_is_to_be_resumed_is_kept_and_handed_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError), atomic_folder(out, keep_partial=True) as folder:
        (folder / "first").touch()
        raise ValueError
    assert not out.exists()
    with atomic_folder(out, keep_partial=True) as folder:
        assert (folder / "first").exists()
    assert _names(tmp_path) == ["out"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    _finish(out, "1")
    out.rename(tmp_path / "out.old")
    with pytest.raises(ValueError), atomic_folder(out):
        raise ValueError
    assert (out / "metrics.json").read_text() == "1"
    assert _names(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(AdfmError, match="photos holds files that adfm did not write"):
        _finish(tmp_path / "photos", "1")
    assert _names(tmp_path / "photos") == ["holiday.jpg"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AdfmError, match="is a file"):
        _finish(tmp_path / "out", "1")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_is_an_error_that_speaks(tmp_path: Path) -> None:
    with (
        pytest.raises(AdfmError, match=r"out: No space left on device; free some space"),
        atomic_folder(tmp_path / "out"),
    ):
        Path("/dev/full").write_bytes(b"x")
    assert _names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_an_error_that_speaks(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AdfmError, match="Permission denied; change the permissions"):
        _finish(tmp_path / "out", "1")


def test_other_system_errors_are_not_disguised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out"):
        (tmp_path / "missing").read_bytes()


@pytest.mark.parametrize("name", ["out", "out.old"])  # the second: killed while one model replaced the other
def test_a_finished_model_is_replaced_by_force_only(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    refuse_to_replace(out)
    (tmp_path / name).mkdir()
    refuse_to_replace(out)
    (tmp_path / name / "adfm.json").write_text("{}")
    with pytest.raises(AdfmError, match=f"{name} holds a finished model, .* add --force"):
        refuse_to_replace(out)
    refuse_to_replace(out, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_a_model_is_not_replaced_by_one_not_even_by_force(tmp_path: Path, force: bool) -> None:
    _finish(tmp_path / "evaluation", "1")
    with pytest.raises(AdfmError, match=r"holds the result of another stage \(metrics.json\)"):
        refuse_to_replace(tmp_path / "evaluation", force)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letters.txt").write_text("dear")
    with pytest.raises(AdfmError, match="holds files that adfm did not write"):
        refuse_to_replace(tmp_path / "foreign", force)


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    replace_json({"loss": 1.0}, file)
    with pytest.raises(ValueError, match="nan"):
        replace_json({"loss": float("nan")}, file)
    with pytest.raises(KeyError), replacing(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert json.loads(file.read_text()) == {"loss": 1.0}
    with replacing(file) as partial:
        partial.write_text("{}")
    assert file.read_text() == "{}" and [*tmp_path.iterdir()] == [file]


def test_a_walk_goes_by_name_and_through_links(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.png", "a/3.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.png").touch()
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    files = [(folder / name).relative_to(tmp_path).as_posix() for folder, its in walk(tmp_path / "set") for name in its]
    assert files == ["set/a/3.png", "set/b/1.png", "set/b/2.png", "set/c/4.png"]
    with pytest.raises(FileNotFoundError):
        next(walk(tmp_path / "nowhere"))
