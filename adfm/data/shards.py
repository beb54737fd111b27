"""Shards: the converted data set as Parquet files `{train,validation,test}-NNNNN.parquet`."""

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from adfm.errors import AdfmError
from adfm.files import replacing
from adfm.records import SPLITS, Box, Record

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class _Type(NamedTuple):  # how values of a Python type are stored
    arrow: pa.DataType
    feature: dict[str, Any]  # their type for `datasets`
    store: Callable[[Any], Any] = lambda value: value
    load: Callable[[Any], Any] = lambda stored: stored


_FLOAT = {"dtype": "float64", "_type": "Value"}
# `datasets` 3 and older know no `List`; 4 and later read a `Sequence` as one.
_BOXES = {"_type": "Sequence", "feature": {"_type": "Sequence", "length": 4, "feature": _FLOAT}}
_TYPES = {
    str: _Type(pa.string(), {"dtype": "string", "_type": "Value"}),
    int: _Type(pa.int32(), {"dtype": "int32", "_type": "Value"}),
    float: _Type(pa.float64(), _FLOAT),
    bytes: _Type(
        _IMAGE,
        {"_type": "Image"},
        lambda content: None if content is None else {"bytes": content, "path": None},
        lambda stored: stored["bytes"] if stored else None,
    ),
    tuple[Box, ...]: _Type(
        pa.list_(pa.list_(pa.float64(), 4)),
        _BOXES,
        lambda boxes: [list(box) for box in boxes],
        lambda stored: tuple(Box(*box) for box in stored),
    ),
}


class Columns:
    """The columns of shards: the fields of a dataclass, in their order; those of type `X | None` may be null.

    To add a column, add a field to `Record` (and set it in `adfm.data.conversion`): schema, writer, reader and the
    expectations of validation follow from here.

    Attributes:
        schema: The Arrow schema of a shard, with the features that `datasets` reads.
        small: Names of all columns but images and masks.
        required: Names of the columns of text and numbers that are never null.
    """

    def __init__(self, record: type[Record]) -> None:
        self._record = record
        self._types: dict[str, _Type] = {}
        self.small: list[str] = []
        self.required: list[str] = []
        for name, hint in get_type_hints(record).items():  # in the order of the fields
            optional = NoneType in get_args(hint)
            if optional:
                [hint] = set(get_args(hint)) - {NoneType}
            python = str if get_origin(hint) is Literal else hint
            self._types[name] = _TYPES[python]
            if python is not bytes:
                self.small.append(name)
            if python in (str, int, float) and not optional:
                self.required.append(name)
        # `datasets.load_dataset("parquet", data_dir=...)` reads shards without help.
        features = {name: kind.feature for name, kind in self._types.items()}
        self.schema = pa.schema(
            [pa.field(name, kind.arrow) for name, kind in self._types.items()],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )

    def table(self, records: Sequence[Record]) -> pa.Table:
        """Return records as a table of `schema`."""
        columns: dict[str, Any] = {
            name: [kind.store(getattr(record, name)) for record in records]
            for name, kind in self._types.items()
            if name != "image"
        }
        # A chunk an image: Arrow writes it from where it lies. Copied into one column first, large images take four
        # times as long to write, nearly all of it for the memory of the copies.
        columns["image"] = pa.chunked_array([_image(record) for record in records])
        return pa.table([columns[name] for name in self.schema.names], schema=self.schema)

    def record(self, row: dict[str, Any]) -> Record:
        """Return the record of a row, as `pa.Table.to_pylist` gives it."""
        return self._record(**{name: kind.load(row[name]) for name, kind in self._types.items()})


COLUMNS = Columns(Record)

# A reader holds a row group in memory at a time.
_GROUP_ROWS = 100
_GROUP_BYTES = 16 * 2**20


class _Pieces(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data)
        # A megabyte at a time: Linux 6.18 takes up to four times as long for nine megabytes at once.
        while content:
            content = content[self._file.write(content[: 2**20]) :]
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Shard:
    """A shard to add records to; a row group is written while the next one is collected."""

    def __init__(self, path: Path) -> None:
        self._file = _Pieces(path)
        # Images are compressed already; statistics and dictionaries of them would only cost.
        options = {"compression": "none", "write_statistics": COLUMNS.small}
        repeated = ["dataset", "category"]  # the same text in many rows
        self._parquet = pq.ParquetWriter(self._file, COLUMNS.schema, use_dictionary=repeated, **options)
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
        """Wait until the row group before is written, and begin to write the one that is collected."""
        if self._writing:
            self._writing.result()
        self._writing = None
        if self._records:
            self._writing = self._writer.submit(self._parquet.write_table, COLUMNS.table(self._records))
        self._records, self._bytes = [], 0

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._parquet.close)
            stack.callback(self._writer.shutdown)
            self._flush()
            self._flush()  # waits for the last one


def name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}-{number:05d}.parquet"


def write(records: Iterable[Record], folder: Path, shard_images: int) -> None:
    """Write records, in their order, into shards of `shard_images` images; the same records give the same bytes.

    Memory holds two row groups of each split, however many records there are.
    """
    # Memory holds two row groups of each split, however many records there are.
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
    """Write one shard atomically."""
    with replacing(path) as unfinished, closing(_Shard(unfinished)) as shard:
        for record in records:
            shard.add(record)


def read(folder: Path, split: str | None = None) -> Iterator[Record]:
    """Yield the records of a split (or of all), in the order in which they were written, a row group at a time.

    Raises:
        AdfmError: There are no such shards, or one cannot be read.
    """
    for rows in batches(folder, split, COLUMNS.schema.names):
        yield from map(COLUMNS.record, rows.to_pylist())


def table(folder: Path, split: str | None = None) -> pa.Table:
    """Read all columns but `image` and `mask`."""
    schema = pa.schema([COLUMNS.schema.field(name) for name in COLUMNS.small])
    return pa.Table.from_batches(batches(folder, split, COLUMNS.small), schema=schema)


def ids(folder: Path, split: str | None = None) -> list[str]:
    """Read the ids of a split (or of all), in the order of the shards."""
    return [id_ for rows in batches(folder, split, ["id"]) for id_ in rows["id"].to_pylist()]


def fingerprint(folder: Path, split: str | None = None) -> str:
    """Return the SHA-256, hex, of images, masks, labels and boxes, whatever their order and files.

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
    """Read which values became black and white when grey images of more than 8 bits were converted, if any were."""
    file = folder / "conversion.json"
    try:
        bounds = json.loads(file.read_bytes()).get("grey_range") if file.is_file() else None
        return (int(bounds[0]), int(bounds[1])) if bounds else None
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise AdfmError(f"{file} cannot be read ({error!r}); make the shards again with `adfm convert`.") from error


def batches(folder: Path, split: str | None, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a split (or of all) as Arrow batches of some columns; other columns are not read.

    Raises:
        AdfmError: There are no such shards, or one cannot be read.
    """
    if split is not None and split not in SPLITS:
        raise AdfmError(f"no split is called {split!r}; choose one of {', '.join(SPLITS)}.")
    paths = [path for name in SPLITS if split in (None, name) for path in sorted(folder.glob(f"{name}-*.parquet"))]
    if not paths:
        kind = split or "train, validation or test"
        raise AdfmError(f"{folder}: no {kind} shards here; make them with `adfm convert`.")
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                if not file.schema_arrow.equals(COLUMNS.schema):
                    raise AdfmError(f"{path}: its columns are not those of a shard; make it again with `adfm convert`.")
                yield from file.iter_batches(_GROUP_ROWS, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise AdfmError(f"{path} cannot be read ({error}); make it again with `adfm convert`.") from error


def _image(record: Record) -> pa.StructArray:
    offsets = pa.py_buffer(np.array([0, len(record.image)], np.int32))
    content = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(record.image)])
    return pa.StructArray.from_arrays([content, pa.array([record.source], pa.string())], fields=list(_IMAGE))
