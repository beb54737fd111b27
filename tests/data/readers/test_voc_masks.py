from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adfm.data.problems import MissingImage
from adfm.data.readers import voc
from adfm.data.readers.shapes import pixels
from adfm.records import Sample
from tests.data.readers.drawn import by_source, problems, touch

_RED, _GREEN, _VOID = (128, 0, 0), (0, 128, 0), (224, 224, 192)
_SIZE = (24, 32)  # height, width


def _indices() -> np.ndarray:
    """Two patches of class 1 and one of class 2, with a border."""
    values = np.zeros(_SIZE, np.uint8)
    values[2:8, 2:10] = 255
    values[3:7, 3:9] = 1
    values[12:16, 4:6] = 1
    values[20:24, 28:32] = 2
    return values


def _palette() -> list[int]:
    colors = np.zeros((256, 3), int)
    for number in range(256):
        for place in range(8):
            for channel in range(3):
                colors[number, channel] |= (number >> 3 * place + channel & 1) << 7 - place
    return [int(value) for value in colors.ravel()]


def _save(path: Path, values: np.ndarray, mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(_palette())
    elif mode == "RGB":
        image.putpalette(_palette())
        image = image.convert("RGB")
    image.save(path)


def _boxes(sample: Sample) -> list[tuple[int, ...]]:
    return sorted(tuple(map(int, box)) for box in sample.boxes)


_THREE = [(3, 3, 9, 7), (4, 12, 6, 16), (28, 20, 32, 24)]


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_masks_of_classes_without_xml(tmp_path: Path, mode: str) -> None:
    touch(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    _save(tmp_path / "SegmentationClass/a.png", _indices(), mode)
    assert voc.matches(tmp_path)
    samples = by_source(voc.read, tmp_path)
    assert samples.keys() == {"JPEGImages/a.jpg", "JPEGImages/b.jpg"}
    sample = samples["JPEGImages/a.jpg"]
    assert (_boxes(sample), sample.defect) == (_THREE, "class 1+class 2")
    together = np.logical_or.reduce([pixels(rle) for rle in sample.rles])
    assert (together == ((_indices() != 0) & (_indices() != 255))).all()
    assert samples["JPEGImages/b.jpg"].label == "normal"


def test_objects_of_several_patches_are_one_box(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/cam/a.jpg")
    objects = np.where(_indices() == 255, 255, np.where(_indices() == 1, 5, np.where(_indices() == 2, 6, 0)))
    _save(tmp_path / "SegmentationClass/cam/a.png", _indices())
    _save(tmp_path / "SegmentationObject/cam/a.png", objects.astype(np.uint8))
    sample = by_source(voc.read, tmp_path)["JPEGImages/cam/a.jpg"]
    assert (_boxes(sample), sample.defect) == ([(3, 3, 9, 16), (28, 20, 32, 24)], "class 1+class 2")


def test_the_names_of_cvat_and_of_labelme(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg")
    _save(tmp_path / "SegmentationClass/a.png", _indices(), "RGB")
    (tmp_path / "class_names.txt").write_text("_background_\nscratch\ndent")
    assert by_source(voc.read, tmp_path)["JPEGImages/a.jpg"].defect == "dent+scratch"
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "crack:128,0,0::", "hole:0,128,0::"]
    (tmp_path / "labelmap.txt").write_text("\n".join(lines))
    assert by_source(voc.read, tmp_path)["JPEGImages/a.jpg"].defect == "crack+hole"


def test_the_segmentation_export_of_cvat(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg", "JPEGImages/b.jpg")
    classes = np.zeros((*_SIZE, 3), np.uint8)
    classes[3:7, 3:9] = (250, 50, 83)
    _save(tmp_path / "SegmentationClass/a.png", classes, "as it is")
    objects = np.zeros((*_SIZE, 3), np.uint8)
    objects[3:7, 3:6], objects[3:7, 6:9] = _RED, _GREEN
    _save(tmp_path / "SegmentationObject/a.png", objects, "as it is")
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nscratch:250,50,83::\nbackground:0,0,0::\n")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/default.txt").write_text("a\nb\n")
    samples = by_source(voc.read, tmp_path)
    sample = samples["JPEGImages/a.jpg"]
    assert (_boxes(sample), sample.defect, sample.split) == ([(3, 3, 6, 7), (6, 3, 9, 7)], "scratch", None)
    assert samples["JPEGImages/b.jpg"].label == "normal"


def test_a_mask_counts_where_no_object_does(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg")
    _save(tmp_path / "SegmentationClass/a.png", _indices())
    file = tmp_path / "Annotations/a.xml"
    file.parent.mkdir()
    file.write_text("<annotation><segmented>1</segmented></annotation>")
    assert _boxes(by_source(voc.read, tmp_path)["JPEGImages/a.jpg"]) == _THREE
    inside = "<xmin>3</xmin><ymin>3</ymin><xmax>10</xmax><ymax>8</ymax>"
    file.write_text(f"<annotation><object><name>dent</name><bndbox>{inside}</bndbox></object></annotation>")
    sample = by_source(voc.read, tmp_path)["JPEGImages/a.jpg"]
    assert _boxes(sample) == [(2, 2, 10, 8), *_THREE[1:]]
    assert sample.notes == ("a mask without an object of its own is a defect too",)


def test_a_binary_mask(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg")
    _save(tmp_path / "SegmentationClass/a.png", np.where(_indices() == 2, np.uint8(255), np.uint8(0)), "L")
    sample = by_source(voc.read, tmp_path)["images/a.jpg"]
    assert (_boxes(sample), sample.defect) == (_THREE[2:], "class 1")


def test_an_empty_mask_is_normal(tmp_path: Path) -> None:
    touch(tmp_path, "JPEGImages/a.jpg")
    _save(tmp_path / "SegmentationClass/a.png", np.zeros(_SIZE, np.uint8))
    assert by_source(voc.read, tmp_path)["JPEGImages/a.jpg"].label == "normal"


def test_what_is_wrong_with_masks(tmp_path: Path) -> None:
    touch(tmp_path, *(f"JPEGImages/{name}.jpg" for name in "abcd"), "SegmentationClass/a.png")
    _save(tmp_path / "SegmentationClass/b.png", np.full((*_SIZE, 3), 77, np.uint8), "as it is")
    _save(tmp_path / "SegmentationClass/c.png", _indices())
    _save(tmp_path / "SegmentationObject/c.png", _indices()[:20])
    _save(tmp_path / "SegmentationClass/d.png", np.zeros(_SIZE, np.uint8))
    _save(tmp_path / "SegmentationObject/d.png", _indices())
    _save(tmp_path / "SegmentationClass/gone.png", _indices())
    listed = problems(voc.read, tmp_path)
    assert listed[0].startswith("SegmentationClass/a.png: the mask cannot be read (cannot identify image file")
    assert listed[1:] == [
        "SegmentationClass/b.png: has the colour (77, 77, 77), and no list says which class that is; add labelmap.txt"
        " with a line `name:77,77,77::` a class",
        "SegmentationObject/c.png: is of another size than the mask in SegmentationClass",
        "SegmentationObject/d.png: has an object that the mask in SegmentationClass gives no class; paint it there as"
        " well",
        "SegmentationClass/gone.png: its image gone.* is missing",
    ]
    assert isinstance(listed[-1], MissingImage)
    (tmp_path / "labelmap.txt").write_text("scratch:1,2::\n")
    assert "labelmap.txt: line 1: is not a class and its colour, `name:r,g,b::`" in problems(voc.read, tmp_path)
