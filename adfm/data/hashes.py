"""Hash the training images, without names or paths; kept with a model to check that no test image was trained on."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from adfm.data import duplicates
from adfm.data import shards as shards_
from adfm.data.images import reduced
from adfm.errors import AdfmError
from adfm.process import cpus
from adfm.process.progress import bar

FILE = "trained_on.parquet"  # in a model's folder: the training and validation images of cold start and training
SEEN = ("train", "validation")  # splits of a training: weights are fitted on the one, thresholds on the other
HASH = pa.binary(16)  # half of a SHA-256: no two of 10^10 pairs are equal by chance
_SKETCH = 48
_FEW = 20  # rows
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("bytes", HASH, nullable=False),  # of the raw file
        pa.field("pixels", HASH, nullable=False),
        pa.field("sketch", pa.binary(2 * _SKETCH), nullable=False),  # `duplicates.sketch`, as float16
        pa.field("contrast", pa.float32(), nullable=False),  # in grey levels
        pa.field("part", HASH),  # of category and part; null where the part is not known
    ],
    metadata={"adfm": "hashes of images, 1"},
)


class BadTable(AdfmError):
    """A file is not a table of hashes."""

    exit_code = 2


def collect(shards: Path, splits: Sequence[str]) -> pa.Table:
    """Return the hashes of the images of some splits, as rows of `SCHEMA`; splits without shards are left out.

    Raises:
        AdfmError: The shards or an image cannot be read.
    """
    present = [split for split in splits if any(shards.glob(f"{split}-*.parquet"))]
    batches = []
    progress = bar(total=sum(len(shards_.ids(shards, split)) for split in present), desc="hash images", unit="image")
    with progress, ThreadPoolExecutor(cpus.count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged and on huge images
        for split in present:
            for rows in shards_.batches(shards, split, ["id", "image", "category", "sha256", "group"]):
                # A few at a time, so that images are not in memory twice.
                for start in range(0, rows.num_rows, _FEW):
                    some = rows.slice(start, _FEW).to_pylist()
                    # As Arrow: 400 bytes an image.
                    batches.append(pa.RecordBatch.from_pylist(list(pool.map(_hashes, some)), schema=SCHEMA))
                    progress.update(len(some))
    return unite([pa.Table.from_batches(batches, schema=SCHEMA)])


def unite(tables: Iterable[pa.Table]) -> pa.Table:
    """Return the rows of all tables, each once, ordered by their content."""
    rows = pa.concat_tables(tables).group_by(SCHEMA.names, use_threads=False).aggregate([])
    return rows.sort_by([(name, "ascending") for name in ("id", "bytes", "pixels", "part", "contrast")]).cast(SCHEMA)


def of_model(folder: Path) -> pa.Table | None:
    """Read the table in a model's folder; `None` without one, as adfm before 0.9 left it.

    Raises:
        AdfmError: It cannot be read.
    """
    return read(folder / FILE) if (folder / FILE).is_file() else None


def write(table: pa.Table, file: Path) -> None:
    """Write a table; with one version of Arrow, the same rows give the same bytes."""
    # The exponents of sketches are alike: side by side, zstd compresses them.
    encodings = dict.fromkeys(SCHEMA.names, "PLAIN") | {"sketch": "BYTE_STREAM_SPLIT"}
    pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding=encodings)


def read(file: Path) -> pa.Table:
    """Read a table that `write` wrote.

    Raises:
        BadTable: The file cannot be read, or is another table.
    """
    try:
        with pq.ParquetFile(file) as opened:
            if not opened.schema_arrow.equals(SCHEMA, check_metadata=True):
                raise BadTable(f"{file} is not a table that this version of adfm compares; train and register again.")
            return opened.read()
    except (pa.ArrowInvalid, OSError) as error:
        raise BadTable(f"{file} cannot be read ({error}); get it again, or train and register again.") from error


def sketches(table: pa.Table) -> NDArray[np.float16]:
    """Return the column `sketch` as [images, 48]."""
    return np.frombuffer(b"".join(table["sketch"].to_pylist()), "<f2").reshape(-1, _SKETCH)


def _hashes(row: dict[str, Any]) -> dict[str, Any]:
    try:
        content, digest = row["image"]["bytes"], bytes.fromhex(row["sha256"])[:16]
        small, size = reduced(content)
        whole = small if small.format == "PNG" else Image.open(io.BytesIO(content))
        pixels = whole.convert("RGB").tobytes()
        thumbnail, contrast = duplicates.thumbnail(small)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        where = f"image {row['id']}"
        raise AdfmError(f"{where} cannot be read ({error}); make the shards again with `adfm convert`.") from error
    part = json.dumps([row["category"], row["group"]]) if row["group"] is not None else None
    return {
        "id": row["id"],
        "bytes": digest,
        "pixels": hashlib.sha256(f"{size} ".encode() + pixels).digest()[:16],
        "sketch": duplicates.sketch(thumbnail[None]).tobytes(),
        "contrast": contrast,
        "part": part and hashlib.sha256(part.encode()).digest()[:16],
    }
