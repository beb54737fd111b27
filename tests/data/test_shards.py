import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data import conversion, shards
from adfm.errors import AdfmError
from adfm.files import atomic_folder
from adfm.params import Params
from adfm.records import SPLITS, Box, Record

number = st.floats(0, 10_000, allow_nan=False)
records = st.builds(
    Record,
    id=st.uuids().map(str),
    image=st.binary(max_size=50),
    mask=st.none() | st.binary(max_size=50),
    width=st.integers(1, 20_000),
    height=st.integers(1, 20_000),
    dataset=st.text(max_size=5),
    category=st.text(max_size=5),
    defect=st.none() | st.text(max_size=5),
    label=st.sampled_from(["normal", "anomalous"]),
    boxes=st.lists(st.builds(Box, number, number, number, number), max_size=4).map(tuple),
    split=st.sampled_from(SPLITS),
    source=st.text(max_size=20),
    sha256=st.text(max_size=5),
)


def _key(record: Record) -> tuple[int, str]:
    return SPLITS.index(record.split), record.id


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(records, min_size=1, max_size=30, unique_by=lambda r: r.id), shard_images=st.integers(1, 12))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Record], shard_images: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    shards.write(iter(rows), folder, shard_images)
    assert sorted(shards.read(folder), key=_key) == sorted(rows, key=_key)
    for split in {row.split for row in rows}:
        of_split = [row for row in rows if row.split == split]
        assert list(shards.read(folder, split)) == of_split
        assert shards.ids(folder, split) == [row.id for row in of_split]
        assert len(list(folder.glob(f"{split}-*.parquet"))) == -(-len(of_split) // shard_images)
        small = shards.table(folder, split)
        assert small.column_names == shards.COLUMNS.small
        assert small["boxes"].to_pylist() == [[list(box) for box in row.boxes] for row in of_split]


@settings(deadline=None, max_examples=10)
@given(rows=st.lists(records, min_size=1, max_size=12, unique_by=lambda r: r.id), random=st.randoms())
def test_a_fingerprint_is_of_content_not_of_order_or_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Record], random: object
) -> None:
    one, two, other = (tmp_path_factory.mktemp("shards") for _ in range(3))
    shards.write(rows, one, 5)
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    shards.write(shuffled, two, 3)
    assert shards.fingerprint(one) == shards.fingerprint(two)

    first = rows[0]
    for name, value in {
        "boxes": (*first.boxes, Box(1, 2, 3, 4)),
        "mask": (first.mask or b"") + b"x",
        "label": "normal" if first.label == "anomalous" else "anomalous",
        "sha256": first.sha256 + "0",
        "defect": (first.defect or "") + "x",
    }.items():
        changed = Record(**{**{field: getattr(first, field) for field in first.__dataclass_fields__}, name: value})
        for path in other.iterdir():
            path.unlink()
        shards.write([changed, *rows[1:]], other, 5)
        assert shards.fingerprint(other) != shards.fingerprint(one), name


@dataclass(frozen=True)
class RecordWithCamera(Record):
    camera: str = "top"
    shift: float | None = None


def test_a_new_field_of_a_record_is_a_column_of_schema_writer_and_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = shards.COLUMNS
    monkeypatch.setattr(shards, "COLUMNS", shards.Columns(RecordWithCamera))
    assert shards.COLUMNS.schema.names == [*former.schema.names, "camera", "shift"]
    assert shards.COLUMNS.small == [*former.small, "camera", "shift"]
    assert shards.COLUMNS.required == [*former.required, "camera"]
    rows = [RecordWithCamera(**vars(_record(index, 10)), camera=f"camera {index}", shift=0.1) for index in range(2)]
    rows.append(RecordWithCamera(**vars(_record(2, 10))))
    shards.write(rows, tmp_path, 1000)
    assert list(shards.read(tmp_path)) == rows
    assert shards.table(tmp_path)["camera"].to_pylist() == ["camera 0", "camera 1", "top"]
    assert datasets.Features.from_arrow_schema(shards.COLUMNS.schema)["camera"] == datasets.Value("string")


def test_the_same_records_give_the_same_bytes(tmp_path: Path, mvtec_folder: Path) -> None:
    conversion.convert(mvtec_folder, tmp_path / "shards", Params())
    (tmp_path / "again").mkdir()
    shards.write(shards.read(tmp_path / "shards"), tmp_path / "again", 1000)
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes()


def test_the_datasets_library_reads_them_without_help(tmp_path: Path, mvtec_folder: Path) -> None:
    conversion.convert(mvtec_folder, tmp_path / "shards", Params())
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "shards"), cache_dir=str(tmp_path / "cache"))
    streamed = datasets.load_dataset("parquet", data_dir=str(tmp_path / "shards"), streaming=True)
    for split in SPLITS:
        expected = list(shards.read(tmp_path / "shards", split))
        assert isinstance(loaded[split].features["image"], datasets.Image)
        assert loaded[split]["id"][:] == [record.id for record in expected]
        assert [row["id"] for row in streamed[split]] == [record.id for record in expected]
    row = next(row for row in loaded["test"] if row["mask"])
    assert row["image"].size == row["mask"].size == (row["width"], row["height"])
    assert [row["boxes"] for row in loaded["test"]] == [
        [list(box) for box in record.boxes] for record in shards.read(tmp_path / "shards", "test")
    ]
    # The schema states what the library itself would state of these features, but for the name that version 3 reads.
    metadata = json.loads(loaded["test"].features.arrow_schema.metadata[b"huggingface"])
    own = shards.COLUMNS.schema.metadata[b"huggingface"].decode()
    assert metadata == json.loads(own.replace('"Sequence"', '"List"'))


def _record(index: int, size: int) -> Record:
    return Record(
        f"{index:03d}", bytes(size), None, 1, 1, "d", "c", None, "normal", (), "train", f"{index}.png", f"{index}"
    )


def test_a_row_group_is_bounded_in_images_and_bytes(tmp_path: Path) -> None:
    shards.write((_record(index, 10) for index in range(250)), tmp_path, 1000)
    metadata = pq.read_metadata(tmp_path / "train-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [100, 100, 50]
    shards.write((_record(index, 5 * 2**20) for index in range(5)), tmp_path, 1000)
    assert list(shards.read(tmp_path)) == [_record(index, 5 * 2**20) for index in range(5)]
    metadata = pq.read_metadata(tmp_path / "train-00000.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 1]


def test_a_full_disk_is_an_error_that_speaks(tmp_path: Path) -> None:
    with pytest.raises(AdfmError, match="No space left on device"), atomic_folder(tmp_path / "out") as folder:
        (folder / "train-00000.parquet").symlink_to("/dev/full")
        shards.write((_record(index, 2**16) for index in range(3)), folder, 10)
    assert not any(tmp_path.iterdir())


def test_no_shards_a_wrong_split_a_damaged_or_foreign_file(tmp_path: Path, mvtec_folder: Path) -> None:
    with pytest.raises(AdfmError, match="no train, validation or test shards here"):
        shards.ids(tmp_path)
    with pytest.raises(AdfmError, match="no split is called 'testing'; choose one of train, validation, test"):
        shards.ids(tmp_path, "testing")
    conversion.convert(mvtec_folder, tmp_path / "shards", Params())
    path = tmp_path / "shards" / "test-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdfmError, match=r"test-00000.parquet cannot be read"):
        list(shards.read(tmp_path / "shards"))
    pq.write_table(shards.table(tmp_path / "shards", "train"), path)
    with pytest.raises(AdfmError, match=r"test-00000.parquet: its columns are not those of a shard"):
        shards.table(tmp_path / "shards")
