"""The same scene in the export of every tool comes in as the same boxes, labels and names."""

from pathlib import Path

import pytest

from adfm.data import conversion, shards
from adfm.data.readers import detect
from adfm.params import Params
from tests.data.readers.exports import EXPORTS, Part, parts


@pytest.fixture(scope="module")
def scene() -> list[Part]:
    return parts(12)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_says_what_was_drawn(name: str, scene: list[Part], tmp_path: Path) -> None:
    export = EXPORTS[name]
    raw, out = tmp_path / "line", tmp_path / "shards"
    export.write(raw, scene)
    assert detect(raw)[0] == export.layout
    conversion.convert(raw, out, Params.model_validate({"split": {"validation": 0.2, "test": 0.2}}))
    records = {Path(record.source).stem: record for record in shards.read(out)}
    drawn = export.parts(scene)
    assert records.keys() == drawn.keys()
    for stem, part in drawn.items():
        record = records[stem]
        assert (record.width, record.height) == part.image.size
        assert record.label == ("anomalous" if part.shapes else "normal")
        if part.shapes and export.names:
            assert record.defect.casefold() == part.shapes[0].label
        if export.says == "boxes":
            expected = sorted(shape.box for shape in part.shapes)
            assert sorted(record.boxes) == [pytest.approx(box, abs=0.01) for box in expected]
        else:
            assert bool(record.boxes) == (bool(part.shapes) and export.says == "mask")
