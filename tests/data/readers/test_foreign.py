from pathlib import Path

import pytest

from adfm.data import readers
from adfm.data.readers import foreign
from adfm.errors import AdfmError
from tests.data.readers.drawn import dump, touch

_BOX = {"label": "scratch", "bounding_box": [0.1, 0.1, 0.3, 0.4]}


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"name": "p", "tags": [], "assets": {"1": {"regions": []}}}, "is VoTT's own JSON; export as CSV or"),
        ({"asset": {}, "regions": [{"boundingBox": {}}]}, "is VoTT's own JSON; export as CSV or"),
        (
            [{"image": "a.jpg", "annotations": [{"label": "scratch", "coordinates": {"x": 1}}]}],
            "is CreateML's JSON; export as COCO",
        ),
        (
            {"info": {}, "categories": {}, "items": [{"annotations": [{"label_id": 0}]}]},
            "is Datumaro's JSON; export as 'CVAT for images 1.1' or COCO",
        ),
        ({"classes": ["scratch"], "labels": {"a": [_BOX]}}, "is FiftyOne's own JSON; export with fo.types.COCO"),
        (
            {"samples": [{"filepath": "data/a.jpg", "ground_truth": {"_cls": "Detections"}}]},
            "is FiftyOne's own JSON; export with fo.types.COCO",
        ),
        ({"classes": ["scratch"], "labels": {"a": 0}}, "seems to be FiftyOne's JSON of labels of whole images;"),
        ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}], "holds results of a detector"),
        ({"images": [{"file_name": "a.jpg"}], "categories": []}, "is COCO without annotations or categories;"),
    ],
)
def test_an_export_that_no_reader_takes_is_named_in_the_error(tmp_path: Path, content: object, hint: str) -> None:
    touch(tmp_path, "images/a.jpg")
    dump(tmp_path / "annotations/x.json", content)
    with pytest.raises(AdfmError, match="in no layout that adfm knows: annotations/x.json") as error:
        readers.detect(tmp_path)
    assert f"adfm knows: annotations/x.json {hint}" in str(error.value)


def test_other_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    assert foreign.hint(tmp_path).startswith("it holds images without annotations; export these as well, or sort")
    touch(tmp_path, "a.csv")
    assert foreign.hint(tmp_path) == ""
    touch(tmp_path, "_classes.csv")
    assert foreign.hint(tmp_path).startswith(
        "_classes.csv is Roboflow's CSV of labels of whole images, a column a class; "
    )
    (tmp_path / "_classes.csv").unlink()
    touch(tmp_path, "labels.xlsx")
    assert foreign.hint(tmp_path) == "labels.xlsx is a workbook of Excel; save it as CSV"
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt" / "a.txt").write_text("imagesource:camera\ngsd:1\n1 1 5 1 5 5 1 5 scratch 0\n")
    assert foreign.hint(tmp_path).startswith("labelTxt/a.txt is DOTA's text; ")
