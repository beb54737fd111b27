from pathlib import Path

import pytest

from adfm.data.problems import BadData
from adfm.data.readers import dagm
from tests.data.readers import layouts


def test_everything_that_is_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    layouts.dagm(tmp_path)
    (tmp_path / "Class1/Train/0002.PNG").unlink()
    layouts.image(tmp_path, "Class10/0003.PNG")
    with pytest.raises(BadData) as error:
        list(dagm.read(tmp_path))
    assert error.value.problems == [
        "Class1/Train/Label: no place in the layout, or no image for the mask: 0002_label.PNG",
        "Class10: no place in the layout, or no image for the mask: 0003.PNG",
    ]
