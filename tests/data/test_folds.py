"""Which sets can be cross-validated, and the offer to do so."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adfm.data import folds, shards
from adfm.errors import AdfmError
from adfm.params import Params
from adfm.records import SPLITS, Record


def _params(count: int = 5) -> Params:
    return Params.model_validate({"evaluate": {"folds": count}})


def _write(records: list[Record], folder: Path, kept: bool = False, held_out: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    shards.write(records, folder, shard_images=1000)
    about = {"official_splits_kept": kept, "params": {"split": {"holdout_categories": held_out}}}
    (folder / "conversion.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def records(small_shards: Path) -> list[Record]:
    return [record for record in shards.read(small_shards) if record.category in ("gear", "leather")]


def test_every_image_is_judged_once_and_copies_together(records: list[Record], tmp_path: Path) -> None:
    copies = [replace(record, id=f"{record.id} again", sha256="") for record in records[:4]]  # near-duplicates
    part = [replace(record, group="one part") if number % 9 == 0 else record for number, record in enumerate(records)]
    folder = _write([*part, *copies], tmp_path / "shards")
    codes = folds.assign(folder, _params(4))
    table = shards.table(folder).to_pandas()
    assert codes.shape == (4, len(table))
    assert ((codes == SPLITS.index("test")).sum(axis=0) == 1).all()
    fold = dict(zip(table["id"], (codes == SPLITS.index("test")).argmax(axis=0), strict=True))
    assert all(fold[f"{record.id} again"] == fold[record.id] for record in records[:4])
    assert len({fold[record.id] for record in part if record.group == "one part"}) == 1
    for code in codes:
        anomalous = table["label"] == "anomalous"
        assert all(anomalous[code == split].any() and (~anomalous)[code == split].any() for split in (0, 2))


def test_what_cannot_be_divided_is_refused_with_what_to_do(records: list[Record], tmp_path: Path) -> None:
    normal = [record for record in records if record.label == "normal"]
    defective = [record for record in records if record.label == "anomalous"]
    params = _params()
    with pytest.raises(AdfmError, match="no image is defective, .* set evaluate.folds to 0"):
        folds.assign(_write(normal, tmp_path / "one class"), params)
    same = [replace(record, group="part") for record in defective[2:]]
    with pytest.raises(AdfmError, match="the defective images .* show only 3 parts .* set evaluate.folds to 3, add"):
        folds.assign(_write([*normal, *defective[:2], *same], tmp_path / "few"), params)
    with pytest.raises(AdfmError, match="the data set fixes its splits, .* split.redivide to true"):
        folds.assign(_write(records, tmp_path / "fixed", kept=True), params)
    with pytest.raises(AdfmError, match="split.holdout_categories keeps gear for the test alone"):
        folds.assign(_write(records, tmp_path / "held", held_out=("gear",)), params)
    (tmp_path / "held" / "conversion.json").unlink()
    with pytest.raises(AdfmError, match="does not say whether the data set fixes its splits"):
        folds.assign(tmp_path / "held", params)


def test_one_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="0 .none. or at least 2"):
        _params(1)


def test_a_small_set_is_offered_cross_validation(records: list[Record], tmp_path: Path) -> None:
    counted = {split: [record for record in records if record.split == split] for split in SPLITS}
    defects = sum(record.label == "anomalous" for record in counted["test"])
    folder = _write(records, tmp_path / "shards")
    text = folds.offer(folder)
    assert text is not None
    assert f"the test split has {len(counted['test'])} images, and its {defects} defective ones" in text
    assert "set evaluate.folds=5" in text and "5 times the training" in text
    assert folds.offer(_write(records, tmp_path / "fixed", kept=True)) is None
    many = [replace(record, id=f"{record.id} {n}") for record in records for n in np.arange(1 + 200 // len(records))]
    assert folds.offer(_write(many, tmp_path / "many")) is None
