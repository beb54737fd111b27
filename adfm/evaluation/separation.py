"""Train/test separation: no image that a model is judged on was in the data that it was trained on.

Training keeps a table of hashes of its images in the model's folder (`adfm.data.hashes`), so that every registered
version carries it. The images of a test split are compared with that of the candidate and that of production, in four
ways; a test image counts in the first that fits. The base model's training data are not known, and not compared. The
table is as good as whoever signs the version.
"""

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

NEAR_DUPLICATE = "near-duplicate"  # one picture saved twice, by the rule of `adfm.data.duplicates`
# The raw file; the picture, upright and RGB, whatever file it is in; category and `group`, in any data set.
_COLUMNS = {"same bytes": "bytes", "same pixels": "pixels", "same part": "part"}
KINDS = (*_COLUMNS, NEAR_DUPLICATE)

PAIRS = pa.schema([("test", hashes.HASH), ("other", hashes.HASH), ("copies", pa.bool_())])


def check(test: pa.Table, other: pa.Table, shards: Path) -> pa.Table:
    """Decide by the rule itself on pairs that may be near-duplicates by their sketches, where `shards` have both.

    `test` and `other`, the images that a model was trained on, are those of `hashes.collect`. Returns a row a pair:
    `bytes` of the test image and of the other, and whether they are near-duplicates.

    Raises:
        AdfmError: The shards cannot be read.
    """
    pairs, sides, _ = _likely(test, other)
    here, copies = _by_the_rule(sides, shards) if len(pairs) else (pairs[:, 0], pairs[:, 0])
    columns = {"test": sides[0][here], "other": sides[1][here], "copies": copies}
    return pa.table({name: column.tolist() for name, column in columns.items()}, schema=PAIRS)


def compare(
    test: pa.Table,
    trained_on: Mapping[str, pa.Table | None],
    checked: pa.Table | None = None,
    near_duplicates: bool = True,
) -> dict[str, Any]:
    """Compare the images of a test split with those that models were trained on.

    Sketches estimate whether two images are near-duplicates, to about a tenth of the bound. Pairs whose images were at
    hand were `checked` by the rule itself. `trained_on` has the tables of `candidate`, and of `production` if there is
    one; `None` for what is not known. Near-duplicates are a problem with `near_duplicates`, else only counted.

    Returns:
        `images`: test images that were compared; `against`: by model the images that they were compared with;
        `unknown`: models whose training images are not known; `problems`: dicts of `kind` (of `KINDS`), `of` (the
        model), `ids` (the test images) and `like` (an image of the model's for each); `alike`: the same of
        near-duplicates where they are not a problem; `near_duplicates`; `proved`: whether there is no problem, and the
        candidate is known.
    """
    known = {name: table for name, table in trained_on.items() if table is not None}
    overlaps = [overlap for name, table in known.items() for overlap in _overlaps(test, table, name, checked)]
    alike = [each for each in overlaps if each["kind"] == NEAR_DUPLICATE and not near_duplicates]
    problems = [each for each in overlaps if each not in alike]
    unknown = [name for name in trained_on if name not in known]
    return {
        "images": len(test),
        "against": {name: len(table) for name, table in known.items()},
        "unknown": unknown,
        "problems": problems,
        "alike": alike,
        "near_duplicates": near_duplicates,
        # A production that has seen test images makes the gate stricter, so that it need not be known.
        "proved": not problems and "candidate" not in unknown and len(test) > 0,
    }


def _overlaps(test: pa.Table, other: pa.Table, name: str, checked: pa.Table | None) -> list[dict[str, Any]]:
    """Find the images of `test` that are in `other`, kind by kind, each image once."""
    overlaps, left = [], test
    for kind in KINDS:
        if kind == NEAR_DUPLICATE:
            twin = _near(left, other, checked)
        else:
            index = pc.index_in(left[_COLUMNS[kind]], value_set=other[_COLUMNS[kind]], skip_nulls=True)
            twin = np.asarray(index.fill_null(-1), np.int64)
        hit = twin >= 0
        if hit.any():
            ids, like = left["id"].filter(pa.array(hit)), other["id"].take(pa.array(twin[hit]))
            overlaps.append({"kind": kind, "of": name, "ids": ids.to_pylist(), "like": like.to_pylist()})
            left = left.filter(pa.array(~hit))
    return overlaps


def _near(test: pa.Table, other: pa.Table, checked: pa.Table | None) -> NDArray[np.int64]:
    """Return [test images]: an index into `other` of a near-duplicate; -1 where there is none."""
    pairs, sides, copies = _likely(test, other)
    if checked is not None and len(pairs):
        rule = {(row["test"], row["other"]): row["copies"] for row in checked.to_pylist()}
        keys = zip(*sides, strict=True)
        copies = np.array([rule.get(key, by_sketch) for key, by_sketch in zip(keys, copies.tolist(), strict=True)])
    first = np.full(len(test), -1, np.int64)
    first[pairs[copies, 0]] = pairs[copies, 1]
    return first


def _likely(test: pa.Table, other: pa.Table) -> tuple[NDArray[np.int64], list[NDArray[Any]], NDArray[np.bool_]]:
    """Return [pairs, 2], images that may be near-duplicates, `bytes` of both, and whether their sketches are alike."""
    contrasts, others = (np.asarray(of["contrast"]) for of in (test, other))
    pairs, share = duplicates.likely_copies(hashes.sketches(test), contrasts, hashes.sketches(other), others)
    sides = [np.asarray(of["bytes"])[pairs[:, side]] for side, of in enumerate((test, other))]
    return pairs, sides, share <= 1


def _by_the_rule(sides: list[NDArray[Any]], shards: Path) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the indices of those pairs whose images lie in `shards`, and whether they are near-duplicates."""
    needed = {key.hex(): key for side in sides for key in side.tolist()}
    digests = shards_.table(shards)["sha256"].to_pylist()
    numbers = {needed[digest[:32]]: number for number, digest in enumerate(digests) if digest[:32] in needed}
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
            looks, of = duplicates.mapped(file), np.array(contrasts)
            copies.append(duplicates.are_copies(looks[one], of[one], looks[other], of[other]))
    return here, np.concatenate(copies)
