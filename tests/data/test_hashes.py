from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adfm.data import hashes, shards
from adfm.errors import AdfmError


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_tables_unite_whatever_their_order(small_shards: Path, data: st.DataObject) -> None:
    whole = hashes.collect(small_shards, hashes.SEEN)
    taken = [
        whole.take(pa.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=30)), pa.int64()))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    united = hashes.unite(taken)
    assert united["id"].to_pylist() == sorted({id_ for table in taken for id_ in table["id"].to_pylist()})
    assert hashes.unite(reversed([*taken, united])).equals(united)
    assert hashes.unite([whole, united]).equals(whole)


def test_a_table_is_small_and_says_nothing_but_hashes(small_shards: Path, tmp_path: Path) -> None:
    table = hashes.collect(small_shards, hashes.SEEN)
    hashes.write(table, tmp_path / "one.parquet")
    hashes.write(hashes.unite([table, table]), tmp_path / "two.parquet")
    content = (tmp_path / "one.parquet").read_bytes()
    assert content == (tmp_path / "two.parquet").read_bytes()
    assert hashes.read(tmp_path / "one.parquet").equals(table)
    assert len(content) < 4000 + 200 * len(table)
    for column in ("source", "category", "dataset"):
        assert not any(text.encode() in content for text in set(shards.table(small_shards)[column].to_pylist()))


def test_a_file_that_is_no_table_is_refused(small_shards: Path, tmp_path: Path) -> None:
    file = tmp_path / hashes.FILE
    assert hashes.of_model(tmp_path) is None
    table = hashes.collect(small_shards, ["validation"])
    hashes.write(table, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdfmError, match="trained_on.parquet cannot be read") as error:
        hashes.of_model(tmp_path)
    assert error.value.exit_code == 2
    for other in (pa.table({"id": ["a"]}), table.drop_columns(["part"]), table.replace_schema_metadata({"adfm": "2"})):
        pq.write_table(other, file)
        with pytest.raises(AdfmError, match="is not a table that this version of adfm compares") as error:
            hashes.of_model(tmp_path)
        assert error.value.exit_code == 2


def test_an_image_that_cannot_be_read_is_named(small_shards: Path, tmp_path: Path) -> None:
    first = next(shards.read(small_shards, "train"))
    shards.write([replace(first, image=first.image[:50])], tmp_path, 1000)
    with pytest.raises(AdfmError, match=f"image {first.id} cannot be read"):
        hashes.collect(tmp_path, ["train"])
