"""Contact sheets: which images are on them, and where marks stand."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adfm.cli import main
from adfm.data import pictures, shards
from adfm.data.pictures import Picture
from adfm.data.show import show
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.records import Box, Record

RED = tuple(bytes.fromhex(pictures.MARK[1:]))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def record(name: str, **changes: object) -> Record:
    """A grey image with a defect of 40x20 pixels at (30, 60); its name is split/category/defect/number."""
    split, category, defect, _ = name.split("/")
    bad = defect != "good"
    pixels, mask = np.full((120, 200, 3), 128), np.zeros((120, 200))
    mask[60:80, 30:70] = 255
    one = Record(
        id=name,
        image=png(pixels),
        mask=png(mask) if bad else None,
        width=200,
        height=120,
        dataset="parts",
        category=category,
        defect=defect if bad else None,
        label="anomalous" if bad else "normal",
        boxes=(Box(30, 60, 70, 80),) if bad else (),
        split=split,  # type: ignore[arg-type]
        source=f"{name}.png",
        sha256="0" * 64,
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def written(folder: Path, *records: Record) -> Path:
    folder.mkdir()
    shards.write(records, folder, shard_images=7)
    return folder


class Page(HTMLParser):
    """A page's elements, after proof that each is closed where it should be."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.text = file.read_text(encoding="utf-8").replace("<wbr>", "")
        self.feed(self.text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "span":
            self.texts.append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Shards of two categories, very unequal in what they hold."""
    names = [f"train/gear/good/{number}" for number in range(40)]
    names += [f"test/gear/hole/{number}" for number in range(9)] + ["test/gear/crack/0"]
    names += [f"train/<b>weave & co/good/{number}" for number in range(3)]
    return written(tmp_path / "parts", *map(record, names))


def test_categories_labels_and_defects_have_equal_parts(parts: Path, tmp_path: Path) -> None:
    page = Page(show(parts, tmp_path / "sheet.html", Params(), images=8))
    captions = Counter(zip(page.texts[::4], page.texts[1::4], strict=True))
    assert captions == {
        ("<b>weave & co", "normal"): 3,
        ("gear", "normal"): 3,
        ("gear", "anomalous · hole"): 1,
        ("gear", "anomalous · crack"): 1,
    }
    assert "53 images, 8 shown · 2 categories · 10 anomalous, 43 normal · 43 train, 10 test" in page.text
    assert "<td>gear</td><td>40</td><td>10</td><td>crack 1, hole 9</td>" in page.text


def test_the_seed_draws(parts: Path, tmp_path: Path) -> None:
    def drawn(seed: int) -> list[str]:
        return Page(show(parts, tmp_path / f"{seed}.html", Params(seed=seed), images=8)).texts[3::4]

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_all_images_of_a_small_set_are_shown_and_those_of_one_split_alone(parts: Path, tmp_path: Path) -> None:
    assert len(Page(show(parts, tmp_path / "all.html", Params(), images=1000)).all("figure")) == 53
    page = Page(show(parts, tmp_path / "test.html", Params(), "test", 1000))
    assert page.texts[2::4] == ["test · 200x120"] * 10
    with pytest.raises(AdfmError, match="no image is of the split validation, but of test, train"):
        show(parts, tmp_path / "none.html", Params(), "validation")


def test_a_page_needs_nothing_and_no_name_is_markup(parts: Path, tmp_path: Path) -> None:
    page = Page(show(parts, tmp_path / "sheet.html", Params()))
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe", "b"} == set()
    addresses = [each[name] or "" for _, each in page.elements for name in ("src", "href") if name in each]
    assert all(address.startswith("data:image/") for address in addresses)
    assert "default-src 'none'" in str(page.all("meta"))
    assert "width=device-width" in str(page.all("meta"))
    assert all(image["loading"] == "lazy" and image["width"] and image["height"] for image in page.all("img"))


def test_marks_of_a_page_stand_where_they_should(tmp_path: Path) -> None:
    large = record(
        "test/gear/hole/0",
        image=png(np.full((1200, 2000, 3), 128)),
        mask=png(np.pad(np.full((200, 400), 255), ((600, 400), (300, 1300)))),
        width=2000,
        height=1200,
        boxes=(Box(300, 600, 700, 800),),
    )
    page = Page(show(written(tmp_path / "shards", large), tmp_path / "sheet.html", Params()))
    [image], [drawing] = page.all("img"), page.all("svg")
    width, height = int(image["width"] or 0), int(image["height"] or 0)
    assert width / height == pytest.approx(2000 / 1200, rel=0.01)
    assert drawing["viewbox"] == f"0 0 {width} {height}"
    for box in page.all("rect"):
        x, y, across, down = (float(box[name] or 0) for name in ("x", "y", "width", "height"))
        assert (x / width, across / width) == pytest.approx((0.15, 0.2), abs=1e-3)
        assert (y / height, down / height) == pytest.approx((0.5, 1 / 6), abs=1e-3)
    [layer] = page.all("image")
    with Image.open(io.BytesIO(base64.b64decode((layer["href"] or "").partition(",")[2]))) as file:
        opaque = np.asarray(file.convert("RGBA"))[..., 3] > 0
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    assert [rows[0], rows[-1] + 1] == pytest.approx([height / 2, height * 2 / 3], abs=1)
    assert [columns[0], columns[-1] + 1] == pytest.approx([width * 0.15, width * 0.35], abs=1)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_box_is_framed_from_outside(times: int) -> None:
    mask = np.zeros((50, 80), bool)
    picture = Picture(Image.new("RGB", (80, 50), "black"), (80, 50), mask, (Box(20, 10, 50, 30),))
    pixels = np.asarray(pictures.drawn(picture, 80 * times))
    red = (pixels == RED).all(-1)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert (columns[0], columns[-1]) == (20 * times - 2, 50 * times + 1)
    assert (rows[0], rows[-1]) == (10 * times - 2, 30 * times + 1)
    assert (pixels[10 * times : 30 * times, 20 * times : 50 * times] == 0).all()


def test_boxes_at_the_border_and_tiny_ones_can_be_seen() -> None:
    for box in (Box(0, 0, 80, 50), Box(79, 49, 80, 50), Box(40, 20, 40.1, 20.1)):
        pixels = np.asarray(pictures.drawn(Picture(Image.new("RGB", (80, 50)), (80, 50), None, (box,)), 80))
        assert (pixels == RED).all(-1).sum() >= 12


def test_a_mask_is_tinted_where_it_is_and_a_speck_of_it_does_not_fade() -> None:
    mask = np.zeros((3000, 4000))
    mask[1500, 2000] = 1
    picture = pictures.marked(Image.new("RGB", (80, 60)), (4000, 3000), mask, [])
    assert picture.mask is not None
    assert np.argwhere(picture.mask).tolist() == [[30, 40]]
    pixels = np.asarray(pictures.drawn(picture, 80))
    assert pixels[30, 40, 0] > 60
    assert np.delete(pixels.reshape(-1, 3), 30 * 80 + 40, axis=0).max() == 0


@pytest.mark.parametrize("images", [1, 2, 53])
def test_an_image_file_has_a_place_for_each(parts: Path, tmp_path: Path, images: int) -> None:
    with Image.open(show(parts, tmp_path / "sheet.png", Params(), "test", images)) as sheet:
        pixels = np.asarray(sheet)
    assert sheet.format == "PNG"
    grey = (abs(pixels.astype(int) - 128) <= 2).all(-1).sum()
    side = min(480, int(240 * (48 / min(images, 10)) ** 0.5))
    area = min(images, 10) * side * round(side * 0.6)
    assert grey == pytest.approx(area, rel=0.1)  # less what is marked


def test_raw_data_are_shown_as_conversion_would_make_them(mvtec_folder: Path, tmp_path: Path) -> None:
    page = Page(show(mvtec_folder, tmp_path / "sheet.html", Params(), images=100))
    assert len(page.all("figure")) == 2 * 24
    found = dict(zip(page.texts[3::4], re.findall(r"<figure.*?</figure>", page.text), strict=True))
    assert 'x="20.00" y="7.00" width="8.00" height="6.00"' in found["bolt/test/hole/003.png"]
    assert "<rect" not in found["bolt/test/good/003.png"]
    assert "train · 48x32" in page.texts


def test_drawn_shapes_are_shown(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    Image.new("RGB", (100, 80)).save(raw / "a.png")
    Image.new("RGB", (100, 80)).save(raw / "b.png")
    shapes = [{"label": "hole", "shape_type": "polygon", "points": [[10, 20], [50, 20], [50, 60]]}]
    for name, drawn in (("a", shapes), ("b", [])):
        image = {"imagePath": f"{name}.png", "imageWidth": 100, "imageHeight": 80, "imageData": None}
        (raw / f"{name}.json").write_text(json.dumps({"version": "5", "flags": {}, "shapes": drawn, **image}))
    page = Page(show(raw, tmp_path / "sheet.html", Params.model_validate({"convert": {"layout": "labelme"}})))
    assert len(page.all("figure")) == 2
    assert 'x="10.00" y="20.00" width="40.00" height="40.00"' in page.text
    assert len(page.all("image")) == 1


def spoiled(folder: Path) -> Path:
    (folder / "bolt/test/good/000.png").write_bytes(b"no image")
    (folder / "bolt/test/good/001.png").write_bytes((folder / "bolt/test/good/001.png").read_bytes()[:-500])
    Image.new("L", (9, 9), 255).save(folder / "bolt/ground_truth/hole/000_mask.png")
    Image.new("L", (48, 32), 0).save(folder / "bolt/ground_truth/hole/001_mask.png")
    (folder / "bolt/ground_truth/hole/002_mask.png").unlink()
    return folder


def test_bad_images_have_places_that_say_why(
    mvtec_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Page(show(spoiled(mvtec_folder), tmp_path / "sheet.html", Params(), images=100))
    found = {}
    for name in ("good/000", "good/001", "hole/000", "hole/001", "hole/002"):
        [found[name]] = [f for f in re.findall(r"<figure.*?</figure>", page.text) if f"bolt/test/{name}.png<" in f]
    assert "cannot be read (it is not an image)" in found["good/000"]
    assert "truncated" in found["good/001"]
    assert "is 9x9" in found["hole/000"]
    assert "shows no defect" in found["hole/001"]
    assert "002_mask.png cannot be read" in found["hole/002"]
    assert "<img" not in found["good/000"]
    assert "<img" in found["hole/000"]
    assert "bolt/test/hole/002.png" in capsys.readouterr().out  # the reader's own complaint
    show(mvtec_folder, tmp_path / "sheet.png", Params(), images=100)


def test_rows_of_shards_that_are_bad_have_places(tmp_path: Path) -> None:
    bad = [
        record("test/gear/hole/0", image=b""),
        record("test/gear/hole/1", mask=b"no mask"),
        record("test/gear/hole/2", mask=png(np.ones((5, 5)))),
        record("test/gear/hole/3", boxes=(Box(float("nan"), 1, 2, 3), Box(-50, -50, 500, 500), Box(9, 9, 1, 1))),
        record("test/gear/hole/4", category=None, source="a\nb\udcff.png".encode("utf-8", "replace").decode()),
    ]
    folder = written(tmp_path / "shards", *bad)
    page = Page(show(folder, tmp_path / "sheet.html", Params()))
    for problem in ("it is not an image", "its mask does not decode: it is not an image", "its mask is 5x5"):
        assert problem in page.text
    with Image.open(show(folder, tmp_path / "sheet.png", Params())) as sheet:
        sheet.load()


@pytest.mark.parametrize("size", [(1, 1), (3000, 40), (40, 3000), (7, 5), (2500, 2000)])
def test_images_of_any_size_have_a_place(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    mask = np.zeros((height, width))
    mask[: height // 2 + 1, : width // 2 + 1] = 255
    odd = record(
        "test/" + "a very long name " * 20 + "/hole/0",
        image=png(np.full((height, width), 9)),
        mask=png(mask),
        width=width,
        height=height,
        boxes=(Box(0, 0, width // 2 + 1, height // 2 + 1),),
    )
    folder = written(tmp_path / "shards", odd)
    [image] = Page(show(folder, tmp_path / "sheet.html", Params())).all("img")
    assert max(int(image["width"] or 0), int(image["height"] or 0)) == min(640, max(size))
    with Image.open(show(folder, tmp_path / "sheet.png", Params())) as sheet:
        assert max(sheet.size) < 1000


def test_the_orientation_of_a_photograph_is_undone(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = 255
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, quality=95)
    image, size = pictures.thumbnail(buffer.getvalue(), 100)
    assert (image.size, size) == ((20, 40), (20, 40))
    assert np.asarray(image)[:8].min() > 200
    assert np.asarray(image)[12:].max() < 50


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_colour(mode: str) -> None:
    buffer = io.BytesIO()
    bright = Image.new("L", (30, 20), 255)
    image = Image.fromarray(np.full((20, 30), 0xFFFF, np.uint16)) if mode == "I;16" else bright.convert(mode)
    image.save(buffer, "TIFF")
    thumbnail, size = pictures.thumbnail(buffer.getvalue(), 15)
    assert (thumbnail.mode, thumbnail.size, size) == ("RGB", (15, 10), (30, 20))
    assert np.asarray(thumbnail).min() > 250


def test_only_what_is_wanted_is_read_and_rows_have_their_numbers(parts: Path) -> None:
    listed = [row["source"] for row in shards.table(parts).to_pylist()]
    found = dict(pictures.rows(parts, [50, 0, 8, 8]))
    assert list(found) == [0, 8, 50]
    assert [row["image"]["path"] for row in found.values()] == [listed[0], listed[8], listed[50]]


@pytest.mark.parametrize(
    ("out", "split", "images", "said"),
    [
        ("sheet.jpg", None, 9, r"sheet\.jpg: .*\.html or \.png"),
        ("sheet.html", "tets", 9, "no split 'tets'"),
        ("sheet.html", None, 0, "1 to 1000 images; 0 were asked for"),
        ("parts/train-00000.parquet/sheet.html", None, 9, "cannot be written"),
    ],
)
def test_what_cannot_be_done_is_said(parts: Path, out: str, split: str | None, images: int, said: str) -> None:
    with pytest.raises(AdfmError, match=said):
        show(parts, parts.parent / out, Params(), split, images)


def test_a_folder_that_is_not_there_or_is_no_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="no such folder"):
        show(tmp_path / "none", tmp_path / "sheet.html", Params())
    with pytest.raises(AdfmError, match="no layout that adfm knows"):
        show(tmp_path, tmp_path / "sheet.html", Params())
    with pytest.raises(AdfmError, match=r"convert\.layout: the layout 'mvtek' is unknown"):
        show(tmp_path, tmp_path / "sheet.html", Params.model_validate({"convert": {"layout": "mvtek"}}))
    assert list(tmp_path.iterdir()) == []


def test_the_verb_says_where_the_sheet_is(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "parts", "-n", "4"]) == 0
    assert capsys.readouterr().out == "show-parts.html: 4 of 53 images of parts\n"
    assert len(Page(tmp_path / "show-parts.html").all("figure")) == 4
    assert main(["show", "parts", "--out", "a/b.png", "--split", "train", "-n", "4"]) == 0
    assert capsys.readouterr().out == "a/b.png: 4 of 53 images of parts\n"
    assert (tmp_path / "a" / "b.png").is_file()


def test_a_label_alone_is_called_so(tmp_path: Path) -> None:
    for name in ("good/a.png", "crack/b.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (32, 24), "gray").save(tmp_path / name)
    texts = Page(show(tmp_path, tmp_path / "sheet.html", Params())).texts
    assert [text for text in texts if "label alone" in text] == ["anomalous · crack · label alone"]
