from pathlib import Path

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import kolektor
from tests.data.readers import layouts


def test_any_value_but_0_is_a_defect(tmp_path: Path) -> None:
    layouts.kolektor(tmp_path)
    layouts.mask(tmp_path, "kos01/Part0_label.bmp", value=1)
    assert [sample.label for sample in kolektor.read(tmp_path)] == ["anomalous", "anomalous"] + ["normal"] * 2 + [
        "anomalous",
        "normal",
    ]


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.kolektor(tmp_path)
    (tmp_path / "kos01/Part0_label.bmp").unlink()
    (tmp_path / "kos01/Part1_label.bmp").write_text("no picture")
    (tmp_path / "kos02/Part2.jpg").unlink()
    with pytest.raises(BadData) as error:
        list(kolektor.read(tmp_path))
    lines = error.value.problems
    assert lines[0] == "kos01/Part0.jpg: has no mask kos01/Part0_label.bmp"
    assert lines[1].startswith("kos01/Part1_label.bmp: cannot be read (cannot identify image file")
    assert lines[2:] == ["kos02: no place in the layout, or no image for the mask: Part2_label.bmp"]
