"""Train/test separation: no image that a model is judged on was in the data that it was trained on.

Training keeps a table of hashes of its images in the model's folder (`adfm.data.hashes`), so that every registered
version carries it. The images of a test split are compared with that of the candidate and that of production, in four
ways; a test image counts in the first that fits:

- `same bytes`: SHA-256 of the raw file,
- `same pixels`: the picture, upright and RGB, whatever file it is in,
- `same part`: category and `group`, whatever the data set is called,
- `near-duplicate`: one picture saved twice, by the rule of `adfm.data.duplicates`.

What the base model was trained on is not known, and not compared. Nor can the table tell whether a training wrote it:
it is as good as whoever signs the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adfm.data import duplicates, hashes, pictures
from adfm.data import shards as shards_
from adfm.data.images import reduced

NEAR_DUPLICATE = "near-duplicate"
KINDS = ("same bytes", "same pixels", "same part", NEAR_DUPLICATE)
_COLUMNS = {"same bytes": "bytes", "same pixels": "pixels", "same part": "part"}


PAIRS = pa.schema(
    [pa.field("test", hashes.HASH), pa.field("other", hashes.HASH), pa.field("copies", pa.bool_())],
)


def prove(shards: Path, trained_on: Mapping[str, pa.Table | None], near_duplicates: bool = True) -> dict[str, Any]:
    """Compares the test split of some shards with the data that models were trained on.

    The candidate's threshold is chosen on the validation split of these shards, so that counts as seen by it.

    Args:
        shards: Folder of shards.
        trained_on: As of `compare`; `hashes.of_model` gives the table of a model's folder.
        near_duplicates: As of `compare`.

    Returns:
        As `compare`.

    Raises:
        AdfmError: The shards or an image cannot be read.
    """
    test, seen = hashes.collect(shards, ["test"]), dict(trained_on)
    if (candidate := seen.get("candidate")) is not None:
        seen["candidate"] = hashes.unite([candidate, hashes.collect(shards, ["validation"])])
    checked = [check(test, table, shards) for table in seen.values() if table is not None]
    return compare(test, seen, pa.concat_tables([PAIRS.empty_table(), *checked]), near_duplicates)


def check(test: pa.Table, other: pa.Table, shards: Path) -> pa.Table:
    """Decides by the rule itself on pairs that may be near-duplicates by their sketches, where `shards` hold both.

    Args:
        test: As `hashes.collect` gives it.
        other: The same of images that a model was trained on.
        shards: Folder of shards.

    Returns:
        A row a pair: `bytes` of the test image and of the other, and whether they are near-duplicates.

    Raises:
        AdfmError: The shards cannot be read.
    """
    pairs, _ = _likely(test, other)
    sides = [np.asarray(of["bytes"])[pairs[:, side]] for side, of in enumerate((test, other))]
    here, copies = _by_the_rule(sides, shards) if len(pairs) else (pairs[:, 0], pairs[:, 0])
    columns = [sides[0][here], sides[1][here], copies]
    arrays = [pa.array(column.tolist(), type_) for column, type_ in zip(columns, PAIRS.types, strict=True)]
    return pa.Table.from_arrays(arrays, schema=PAIRS)


def compare(
    test: pa.Table,
    trained_on: Mapping[str, pa.Table | None],
    checked: pa.Table | None = None,
    near_duplicates: bool = True,
) -> dict[str, Any]:
    """Compares the images of a test split with those that models were trained on.

    Sketches estimate whether two images are near-duplicates, to about a tenth of the bound. Pairs whose images were at
    hand were `checked` by the rule itself; so shards that conversion divided hold none.

    Args:
        test: As `hashes.collect` gives it.
        trained_on: The tables of `candidate`, and of `production` if there is one; `None` for what is not known.
        checked: As `check` gives it.
        near_duplicates: As `split.near_duplicates`: whether near-duplicates are a problem, or only counted, for data
            sets in which different parts look like copies.

    Returns:
        `images`: test images that were compared; `against`: by model the images that they were compared with;
        `unknown`: models of which it is not known what they were trained on; `problems`: dicts of `kind` (of `KINDS`),
        `of` (the model), `ids` (the test images) and `like` (an image of the model's for each); `alike`: the same of
        near-duplicates where they are not a problem; `near_duplicates`; `proved`: whether there is no problem, and the
        candidate is known. A production that has seen test images makes the gate stricter, so that it need not be.
    """
    known = {name: table for name, table in trained_on.items() if table is not None}
    problems = [problem for name, table in known.items() for problem in _problems(test, table, name, checked)]
    alike = [each for each in problems if each["kind"] == NEAR_DUPLICATE and not near_duplicates]
    problems = [each for each in problems if each not in alike]
    unknown = [name for name in trained_on if name not in known]
    return {
        "images": len(test),
        "against": {name: len(table) for name, table in known.items()},
        "unknown": unknown,
        "problems": problems,
        "alike": alike,
        "near_duplicates": near_duplicates,
        "proved": not problems and "candidate" not in unknown and len(test) > 0,
    }


def _problems(test: pa.Table, other: pa.Table, name: str, checked: pa.Table | None) -> list[dict[str, Any]]:
    """The images of `test` that are in `other`, kind by kind, each image once."""
    problems = []
    left = test
    for kind in KINDS:
        twin = _near(left, other, checked) if kind == NEAR_DUPLICATE else _equal(left, other, _COLUMNS[kind])
        hit = twin >= 0
        if hit.any():
            ids, like = left["id"].filter(pa.array(hit)), other["id"].take(pa.array(twin[hit]))
            problems.append({"kind": kind, "of": name, "ids": ids.to_pylist(), "like": like.to_pylist()})
            left = left.filter(pa.array(~hit))
    return problems


def _equal(test: pa.Table, other: pa.Table, column: str) -> NDArray[np.int64]:
    """[test images]: an index into `other` of an image that has the same value; -1 where none has."""
    index = pc.index_in(test[column], value_set=other[column], skip_nulls=True)
    return np.asarray(index.fill_null(-1), np.int64)


def _near(test: pa.Table, other: pa.Table, checked: pa.Table | None) -> NDArray[np.int64]:
    """As `_equal`, of near-duplicates."""
    pairs, copies = _likely(test, other)
    if checked is not None and len(pairs):
        rule = {(row["test"], row["other"]): row["copies"] for row in checked.to_pylist()}
        keys = zip(*(np.asarray(of["bytes"])[pairs[:, side]] for side, of in enumerate((test, other))), strict=True)
        copies = np.array([rule.get(key, by_sketch) for key, by_sketch in zip(keys, copies.tolist(), strict=True)])
    first = np.full(len(test), -1, np.int64)
    first[pairs[copies, 0]] = pairs[copies, 1]
    return first


def _likely(test: pa.Table, other: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[pairs, 2]: indices of images that may be near-duplicates. [pairs]: whether they are, by their sketches."""
    contrasts, others = (np.asarray(of["contrast"]) for of in (test, other))
    pairs, share = duplicates.likely_copies(hashes.sketches(test), contrasts, hashes.sketches(other), others)
    return pairs, share <= 1


def _by_the_rule(sides: list[NDArray[Any]], shards: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The indices of those pairs whose images lie in `shards`, and whether they are near-duplicates.

    Args:
        sides: Of the first and of the second image of each pair, its `bytes`.
        shards: The shards.
    """
    needed = {key.hex(): key for side in sides for key in side.tolist()}
    numbers: dict[bytes, int] = {}
    first = 0
    for rows in shards_.batches(shards, None, ["sha256"]):
        for number, digest in enumerate(rows["sha256"].to_pylist(), first):
            if digest[:32] in needed:
                numbers[needed[digest[:32]]] = number
        first += rows.num_rows
    places: dict[int, int] = {}
    contrasts: list[float] = []
    with TemporaryFile() as file:
        for number, row in pictures.rows(shards, numbers.values()):
            thumbnail, contrast = duplicates.thumbnail(reduced(row["image"]["bytes"])[0])
            file.write(thumbnail.tobytes())
            places[number] = len(contrasts)
            contrasts.append(contrast)
        file.flush()
        index = np.array([[places.get(numbers.get(key, -1), -1) for key in side.tolist()] for side in sides])
        here = np.flatnonzero((index >= 0).all(axis=0))
        copies = [np.empty(0, bool)]
        for start in range(0, len(here), 1000):
            one, other = index[:, here[start : start + 1000]]
            looks = duplicates.mapped(file)
            of = np.array(contrasts)
            copies.append(duplicates.are_copies(looks[one], of[one], looks[other], of[other]))
    return here, np.concatenate(copies)
