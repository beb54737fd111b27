"""Find copies of one image that a data set labels or marks differently."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from adfm.data.duplicates import Pairs, clusters
from adfm.data.problems import EXAMPLES
from adfm.data.readers import files
from adfm.data.splits import repeated
from adfm.process import cpus

# Yields columns of the rows of some images, in ascending order.
Rows = Callable[[NDArray[np.int64], list[str]], Iterator[dict[str, Any]]]
Decode = Callable[[bytes], Image.Image]


def under_two_labels(raw: Path, images: pa.Table, near_duplicates: Pairs, rows: Rows, decode: Decode) -> list[str]:
    """Return a problem for every image that is normal and, as the same bytes or the same pixels, anomalous too.

    Args:
        raw: The data set.
        images: `label`, `sha256`, `source`, `width`, `height`, `embedded`, and `look`: equal where thumbnails are.
        near_duplicates: [pairs, 2]: indices of images that look alike.
        rows: See `Rows`.
        decode: Decodes the content of a file.
    """
    copies = repeated(images["sha256"].combine_chunks())
    alike = [copies, repeated(images["look"].combine_chunks()), _decoded_differently(images, near_duplicates)]
    same = np.concatenate([copies, _same_pixels(raw, images, np.concatenate(alike), rows, decode)])
    problems = []
    for cluster in _mixed(images, same):
        sources: dict[str, list[str]] = {"normal": [], "anomalous": []}
        for row in images.select(["label", "source"]).take(cluster).to_pylist():
            sources[row["label"]].append(row["source"])
        normal, anomalous = sources["normal"], sources["anomalous"]
        for number in range(max(len(normal), len(anomalous))):  # pairs in which each of both is
            one, other = normal[min(number, len(normal) - 1)], anomalous[min(number, len(anomalous) - 1)]
            problems.append(
                f"{one}: is labelled normal, but {other!r}, the same picture, is anomalous; correct the label of one of"
                " them, or remove it"
            )
    return problems


def _mixed(images: pa.Table, pairs: Pairs) -> list[NDArray[np.int64]]:
    anomalous = pc.equal(images["label"], "anomalous").to_numpy()
    return [cluster for cluster in clusters(pairs) if 0 < anomalous[cluster].sum() < len(cluster)]


def _same_pixels(raw: Path, images: pa.Table, alike: Pairs, rows: Rows, decode: Decode) -> Pairs:
    """Return [pairs, 2] of images with the same pixels in different files, where their labels may differ."""
    # Decoding is slow: only images that look alike, in clusters with both labels.
    mixed = _mixed(images, alike)
    if not mixed:
        return np.empty((0, 2), np.int64)
    some = np.sort(np.concatenate(mixed))
    hashes = images["sha256"].take(some).to_numpy(zero_copy_only=False)
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # each file once, in the order of the rows
    with ThreadPoolExecutor(cpus.count()) as pool:
        paths = [raw / row["file"] for row in rows(some[first[order]], ["file"])]
        digests = np.array([*pool.map(partial(_pixels, decode), paths)], object)
    return some[repeated(pa.array(digests[np.argsort(order)][which], pa.string()))]


def _decoded_differently(images: pa.Table, pairs: Pairs) -> Pairs:
    """Return pairs with two labels and one size that may have equal pixels though their thumbnails differ a little."""
    # A JPEG's thumbnail comes from a smaller scale of it; that of a PNG with the same pixels comes from all of them.
    for name in ("label", "width", "height"):
        values = np.asarray(images[name].combine_chunks().dictionary_encode().indices)
        equal = values[pairs[:, 0]] == values[pairs[:, 1]]
        pairs = pairs[equal if name != "label" else ~equal]
    ends = images.select(["source", "embedded"]).take(pairs.ravel()).to_pylist()
    decoded = [(PurePosixPath(row["source"]).suffix.lower(), row["embedded"]) for row in ends]
    return pairs[[one != other for one, other in zip(decoded[::2], decoded[1::2], strict=True)]]


def _pixels(decode: Decode, path: Path) -> str | None:
    try:
        image = decode(files.content(path))
    except Exception:  # changed since it was inspected, which is an error when it is written
        return None
    return hashlib.sha256(f"{image.size} ".encode() + image.tobytes()).hexdigest()


def marked_differently(images: pa.Table, rows: Rows) -> dict[str, Any]:
    """Count the `pictures` with copies of the same label, but other boxes or defects; `examples` name two copies."""
    copies = np.unique(repeated(images["sha256"].combine_chunks()))
    anomalous = pc.equal(images["label"], "anomalous").to_numpy()
    first: dict[str, tuple[str, int]] = {}
    different: dict[str, list[str]] = {}
    for row in rows(copies[anomalous[copies]], ["source", "sha256", "defect", "boxes"]):
        marks = hash((row["defect"], *map(tuple, row["boxes"])))
        source, first_marks = first.setdefault(row["sha256"], (row["source"], marks))
        if marks != first_marks:
            different.setdefault(row["sha256"], [source, row["source"]])
    return {"pictures": len(different), "examples": list(different.values())[:EXAMPLES]}


def near_duplicates_with_two_labels(images: pa.Table, pairs: Pairs) -> dict[str, Any]:
    """Count the pairs of near-duplicates of which one is normal and one anomalous, with some `examples`."""
    anomalous = pc.equal(images["label"], "anomalous").to_numpy()
    mixed = pairs[anomalous[pairs[:, 0]] != anomalous[pairs[:, 1]]]
    sources = images["source"].take(mixed[:EXAMPLES].ravel()).to_pylist()
    return {"pairs": len(mixed), "examples": [list(pair) for pair in zip(sources[::2], sources[1::2], strict=True)]}
