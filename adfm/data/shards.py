"""Shards: the converted data set as Parquet files `{train,validation,test}-NNNNN.parquet`.

`datasets.load_dataset("parquet", data_dir=...)` reads them without help: `image` and `mask` are its `Image` features
with embedded bytes. Nothing after conversion reads images from anywhere else.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adfm.errors import AdfmError
from adfm.records import SPLITS, Box, Record

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TEXT = {"dtype": "string", "_type": "Value"}
_INTEGER = {"dtype": "int32", "_type": "Value"}
_FEATURES = {
    "id": _TEXT,
    "image": {"_type": "Image"},
    "mask": {"_type": "Image"},
    "width": _INTEGER,
    "height": _INTEGER,
    "dataset": _TEXT,
    "category": _TEXT,
    "defect": _TEXT,
    "label": _TEXT,
    "boxes": {
        # `datasets` 3 and older know no `List`; 4 and later read a `Sequence` as one.
        "_type": "Sequence",
        "feature": {"_type": "Sequence", "length": 4, "feature": {"dtype": "float64", "_type": "Value"}},
    },
    "split": _TEXT,
    "source": _TEXT,
    "sha256": _TEXT,
    "group": _TEXT,
}
_TYPES = {
    "image": _IMAGE,
    "mask": _IMAGE,
    "width": pa.int32(),
    "height": pa.int32(),
    "boxes": pa.list_(pa.list_(pa.float64(), 4)),
}
SCHEMA = pa.schema(
    [pa.field(name, _TYPES.get(name, pa.string())) for name in _FEATURES],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
SMALL = [name for name in SCHEMA.names if name not in ("image", "mask")]

# A row group is what a reader holds in memory at a time.
_GROUP_ROWS = 100
_GROUP_BYTES = 16 * 2**20


class _Pieces(io.RawIOBase):
    """A file that is written a megabyte at a time: Linux 6.18 takes up to four times as long for nine at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data)
        while content:
            content = content[self._file.write(content[: 2**20]) :]
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Shard:
    """A file that records are added to; a group is written while the next one is collected."""

    def __init__(self, path: Path) -> None:
        self._file = _Pieces(path)
        # Images are compressed already; statistics and dictionaries of them would only cost.
        self._parquet = pq.ParquetWriter(
            self._file, SCHEMA, compression="none", use_dictionary=["dataset", "category"], write_statistics=SMALL
        )
        self.images = 0
        self._records: list[Record] = []
        self._bytes = 0
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def add(self, record: Record) -> None:
        self.images += 1
        self._records.append(record)
        self._bytes += len(record.image) + len(record.mask or b"")
        if len(self._records) == _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._wait()
        if self._records:
            self._writing = self._writer.submit(self._parquet.write_table, _table(self._records))
        self._records, self._bytes = [], 0

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()
        self._writing = None

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._parquet.close)
            stack.callback(self._writer.shutdown)
            self._flush()
            self._wait()


def name(split: str, number: int) -> str:
    """The file name of a shard."""
    return f"{split}-{number:05d}.parquet"


def write(records: Iterable[Record], folder: Path, shard_images: int) -> None:
    """Writes `records`, in their order, into the shards of their splits; the same records give the same bytes.

    Memory holds two row groups (each at most 100 images or about 16 MiB) a split, however many records there are.

    Args:
        records: Any iterable; it is walked once.
        folder: An existing folder.
        shard_images: Images a file.
    """
    with ExitStack() as stack:
        opened: dict[str, list[_Shard]] = {split: [] for split in SPLITS}
        for record in records:
            own = opened[record.split]
            if not own or own[-1].images == shard_images:
                for full in own[-1:]:
                    full.close()
                own.append(_Shard(folder / name(record.split, len(own))))
                stack.callback(own[-1].close)
            own[-1].add(record)


def write_one(records: Iterable[Record], path: Path) -> None:
    """Writes one shard: beside its place, and there when it is whole."""
    unfinished = path.with_name(path.name + ".partial")
    with ExitStack() as stack:
        shard = _Shard(unfinished)
        stack.callback(shard.close)
        for record in records:
            shard.add(record)
    unfinished.rename(path)


def read(folder: Path, split: str | None = None) -> Iterator[Record]:
    """Yields the records of a split (or of all), in the order in which they were written, a row group at a time.

    Raises:
        AdfmError: There are no such shards, or one cannot be read.
    """
    for rows in batches(folder, split, SCHEMA.names):
        for row in rows.to_pylist():
            mask = row["mask"]["bytes"] if row["mask"] else None
            boxes = tuple(Box(*box) for box in row["boxes"])
            yield Record(**{**row, "image": row["image"]["bytes"], "mask": mask, "boxes": boxes})


def table(folder: Path, split: str | None = None) -> pa.Table:
    """All columns but `image` and `mask`, without reading those from disk; `.to_pandas()` and `.to_pylist()` work."""
    return pa.Table.from_batches(batches(folder, split, SMALL), schema=pa.schema([SCHEMA.field(n) for n in SMALL]))


def ids(folder: Path, split: str | None = None) -> list[str]:
    """The ids of a split (or of all), in the order of the shards."""
    return [id_ for rows in batches(folder, split, ["id"]) for id_ in rows["id"].to_pylist()]


def fingerprint(folder: Path, split: str | None = None) -> str:
    """SHA-256, hex, of what the rows say (images, masks, labels, boxes), whatever their order and files.

    Equal fingerprints mean that two models evaluated on the two folders were evaluated on the same data.
    """
    columns = ["id", "sha256", "mask", "label", "boxes", "split", "category", "defect"]
    lines = []
    for rows in batches(folder, split, columns):
        for row in rows.to_pylist():
            row["mask"] = hashlib.sha256(row["mask"]["bytes"]).hexdigest() if row["mask"] else None
            row["boxes"] = sorted(row["boxes"])
            lines.append(json.dumps([row[column] for column in columns]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def grey_range(folder: Path) -> tuple[int, int] | None:
    """Values that became black and white when the grey images of more than 8 bits were converted; `None` without such.

    Raises:
        AdfmError: The folder's `conversion.json` cannot be read.
    """
    file = folder / "conversion.json"
    try:
        bounds = json.loads(file.read_bytes()).get("grey_range") if file.is_file() else None
        return (int(bounds[0]), int(bounds[1])) if bounds else None
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise AdfmError(f"{file} cannot be read ({error!r}); make the shards again with `adfm convert`.") from error


def batches(folder: Path, split: str | None, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a split (or of all) as Arrow batches of the columns asked for; what is not asked for is not read.

    Raises:
        AdfmError: There are no such shards, or one cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise AdfmError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    paths = [path for name in SPLITS if split in (None, name) for path in sorted(folder.glob(f"{name}-*.parquet"))]
    if not paths:
        raise AdfmError(
            f"{folder}: no {split or 'train, validation or test'} shards here; make them with `adfm convert`."
        )
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.equals(SCHEMA):
                    raise AdfmError(f"{path}: its columns are not those of a shard; make it anew with `adfm convert`.")
                yield from file.iter_batches(_GROUP_ROWS, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise AdfmError(f"{path} cannot be read ({error}); make it anew with `adfm convert`.") from error


def _table(records: Sequence[Record]) -> pa.Table:
    columns: dict[str, Any] = {name: [getattr(record, name) for record in records] for name in SMALL}
    columns["boxes"] = [[list(box) for box in record.boxes] for record in records]
    columns["mask"] = [None if record.mask is None else {"bytes": record.mask, "path": None} for record in records]
    # A chunk an image: Arrow writes it from where it lies. Copied into one column first, large images take four times
    # as long to write, nearly all of it for the memory of the copies.
    columns["image"] = pa.chunked_array([_image(record) for record in records])
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _image(record: Record) -> pa.StructArray:
    offsets = pa.py_buffer(np.array([0, len(record.image)], np.int32))
    content = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(record.image)])
    return pa.StructArray.from_arrays([content, pa.array([record.source], pa.string())], fields=list(_IMAGE))
