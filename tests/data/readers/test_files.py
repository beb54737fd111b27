import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from adfm.data.problems import BadData, MissingImage
from adfm.data.readers import files
from adfm.data.readers.files import DataSet
from adfm.errors import AdfmError
from adfm.records import Box


def test_images_and_folders_are_listed_by_name_without_hidden_ones(tmp_path: Path) -> None:
    for name in (
        "b.PNG",
        "a b'\".jpg",
        "ä\n.webp",
        ".c.png",
        "d.txt",
        "e",
        "f.png/g.png",
        ".h/i.png",
        "f.png/__MACOSX/j.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in files.images(tmp_path)] == ["a b'\".jpg", "b.PNG", "gone.png", "ä\n.webp"]
    assert list(files.images(tmp_path))[1:3] == [tmp_path / "b.PNG", tmp_path / "gone.png"]
    assert [path.name for path in files.listing(tmp_path, ".txt", ".webp")] == ["d.txt", "ä\n.webp"]
    assert {path.name for path in files.images_within(tmp_path)} == {
        "a b'\".jpg",
        "b.PNG",
        "g.png",
        "gone.png",
        "ä\n.webp",
    }
    assert files.folders(tmp_path) == [tmp_path / "f.png"]
    for missing in (tmp_path / "nowhere", tmp_path / "d.txt"):
        assert list(files.images(missing)) == list(files.images_within(missing)) == files.folders(missing) == []


def test_links_to_folders_are_folders(tmp_path: Path) -> None:
    for name in ("data/a", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for name, target in (("other", "../elsewhere"), ("twin", "a"), ("dead", "x")):
        (tmp_path / "data" / name).symlink_to(target)
    assert [path.name for path in files.folders(tmp_path / "data")] == ["a", "other", "twin"]


def test_links_to_files_and_folders_that_do_not_lead_round_are_nothing_special(tmp_path: Path) -> None:
    for name in ("data/a/b", "data/c", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere" / "1.png").touch()
    links = (
        ("data/other", "../elsewhere"),
        ("data/1.png", "../elsewhere/1.png"),
        ("data/c/a", "../a"),
        ("data/b", "a/b"),
    )
    for name, target in links:
        (tmp_path / name).symlink_to(target)
    (tmp_path / "link").symlink_to("data")
    files.refuse_special(tmp_path / "data")
    files.refuse_special(tmp_path / "link")


def test_everything_special_is_refused_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "a" / "b").mkdir(parents=True)
    os.mkfifo(raw / "a" / "1.png")
    (raw / "x.json").symlink_to("a/1.png")
    (raw / "null.png").symlink_to("/dev/null")
    (raw / ".hidden").symlink_to("nowhere")
    (raw / "itself.png").symlink_to("itself.png")
    (raw / "here").symlink_to(".")
    (raw / "a" / "b" / "up").symlink_to("../..")
    (raw / "a" / "outside").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.open(raw, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{directory}/s.png")  # the path of a socket has to be short
        os.close(directory)
        with pytest.raises(AdfmError) as error:
            files.refuse_special(raw)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{raw}: holds what is not a file or a folder; remove it:"
    special, nowhere, round_ = (
        "is a pipe, a socket or a device, not an ordinary file",
        "is a link that leads nowhere",
        "is a link to a folder that holds it",
    )
    assert sorted(lines[1:]) == sorted(
        [
            *(f"  '{name}' {special}" for name in ("a/1.png", "null.png", "s.png", "x.json")),
            *(f"  '{name}' {nowhere}" for name in (".hidden", "itself.png")),
            *(f"  '{name}' {round_}" for name in ("a/b/up", "a/outside/raw", "here")),
        ]
    )


def test_of_very_many_special_files_the_first_are_listed(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.png").symlink_to("nowhere")
    with pytest.raises(AdfmError, match="leads nowhere\n  and more$") as error:
        files.refuse_special(tmp_path)
    assert len(str(error.value).splitlines()) == 52


def test_folders_nested_very_deep(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(120):
        folder /= "a"
    folder.mkdir(parents=True)
    with pytest.raises(AdfmError, match="a' lies more than 100 folders deep"):
        files.refuse_special(tmp_path)


@settings(deadline=None, max_examples=60)
@given(links=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6, unique=True))
def test_links_are_refused_exactly_where_following_them_never_ends(links: list[tuple[int, int]]) -> None:
    with TemporaryDirectory() as folder:
        raw = Path(folder)
        for number in range(5):
            (raw / str(number)).mkdir()
        for source, target in links:
            (raw / str(source) / f"to{target}").symlink_to(raw / str(target))
        if _is_endless(raw):
            with pytest.raises(AdfmError, match="is a link to a folder that holds it"):
                files.refuse_special(raw)
        else:
            files.refuse_special(raw)


def _is_endless(folder: Path) -> bool:
    walk = os.walk(folder, followlinks=True)
    return any(len(Path(path).parts) > len(folder.parts) + 6 for path, _, _ in walk)  # of five, a folder comes twice


def test_a_folder_without_permission_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    for listed in (files.images, files.folders):
        with pytest.raises(AdfmError, match="cannot be read; change its permissions"):
            listed(tmp_path)


def test_the_only_folder_is_gone_into_three_times(tmp_path: Path) -> None:
    def holds(folder: Path) -> bool:
        return (folder / "sign").is_dir()

    inner = tmp_path / "a" / "b" / "c"
    (inner / "sign").mkdir(parents=True)
    assert files.root(tmp_path, holds) == inner
    assert files.root(tmp_path.parent, holds) is None
    assert files.root(inner, holds) == inner
    (tmp_path / "a" / "other").mkdir()
    assert files.root(tmp_path, holds) is None


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.png", "a/../../x.png", "", ".", "a\0.png"])
def test_a_path_that_leads_out_or_nowhere(name: str, tmp_path: Path) -> None:
    assert files.listed_path([tmp_path], name) is None


def test_a_path_is_looked_for_in_several_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    assert files.listed_path([tmp_path, tmp_path / "a"], "x.png") == tmp_path / "a" / "x.png"
    assert files.listed_path([tmp_path, tmp_path / "a"], "a/x.png") == tmp_path / "a" / "x.png"
    for missing in ("y.png", "y" * 300 + ".png"):
        assert files.listed_path([tmp_path, tmp_path / "a"], missing) == tmp_path / missing


@given(st.text())
def test_no_path_leads_out(name: str) -> None:
    path = files.listed_path([Path("/data/set")], name)
    assert path is None or Path(os.path.normpath(path)).is_relative_to("/data/set")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": [1,\n 2,]}', "x.json: Invalid JSON: trailing comma at line 2 column 4"),
        (b"", "x.json: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b'{"a": "b"}', "x.json: ['a'] Input should be a valid array"),
        (b'{"a": [1, "b"]}', "x.json: ['a'][1] Input should be a valid integer, unable to parse string as an integer"),
        (b"\xff\xff", "x.json: Invalid JSON: expected value at line 1 column 1"),
    ],
)
def test_what_is_wrong_with_a_json_file(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    data = DataSet(tmp_path, "mmad")
    assert data.parse(tmp_path / "x.json", TypeAdapter(dict[str, list[int]])) is None
    assert data.problems == [problem]


def test_json_with_a_byte_order_mark_or_nested_without_end(tmp_path: Path) -> None:
    data = DataSet(tmp_path, "mmad")
    (tmp_path / "x.json").write_text('{"a": [1]}', encoding="utf-8-sig")
    form = TypeAdapter(dict[str, list[int]])
    assert data.parse(tmp_path / "x.json", form) == {"a": [1]}
    (tmp_path / "x.json").write_bytes(b"[" * 100_000)
    assert data.parse(tmp_path / "x.json", form) is None
    assert data.parse(tmp_path / "gone.json", form) is None
    assert [problem.split(":")[0] for problem in data.problems] == ["x.json", "gone.json"]


def test_problems_are_one_line_each_and_listed_once(tmp_path: Path) -> None:
    data = DataSet(tmp_path, "mvtec")
    data.finish("nothing", read=True)
    data.problems += ["螺丝.png: a", "b\n\x1b[31m.png: b", "螺丝.png: a"]
    with pytest.raises(BadData) as error:
        data.finish("nothing")
    assert str(error.value).splitlines()[2:3] == ["    螺丝.png: a"]
    assert r"b\n\x1b[31m.png: b" in str(error.value)
    assert len(error.value.problems) == 2


def test_where_nothing_was_read_that_is_the_problem(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no image at all"):
        DataSet(tmp_path, "mvtec").finish("no image at all")


def test_only_bad_data_in_a_block_become_problems(tmp_path: Path) -> None:
    data = DataSet(tmp_path, "coco")
    for error in (ValueError("is empty"), files.NoImage("the image is missing")):
        with data.at("a.json"):
            raise error
    with pytest.raises(KeyError), data.at("b.json"):
        raise KeyError("a bug")
    assert data.problems == ["a.json: is empty", "a.json: the image is missing"]
    assert [isinstance(problem, MissingImage) for problem in data.problems] == [False, True]


def test_an_anomalous_image_needs_a_mask_or_a_shape(tmp_path: Path) -> None:
    data = DataSet(tmp_path, "table")
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).touch()
    drawn = data.sample("x", tmp_path / "a.png", "scratch", boxes=(Box(0, 0, 1, 1),))
    masked = data.sample("x", tmp_path / "b.png", "scratch", [tmp_path / "c.png"])
    assert list(data.checked([(tmp_path, [drawn, masked])])) == [drawn, masked]
    with pytest.raises(BadData) as error:
        list(data.checked([(None, [data.sample("x", tmp_path / "a.png", "scratch")])]))
    assert error.value.problems == ["a.png: has no mask"]
