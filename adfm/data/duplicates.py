"""Near-duplicates: one picture saved twice, in another format, size or brightness.

Photographs of two parts on one rig look alike as well, and are not duplicates. A perceptual hash of a few bits cannot
tell the one from the other, so what is compared is a small picture of each image, finely: `near_duplicates` measures
how far two of them are apart. docs/experiments.md says what that finds and what it does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
_FINE = 128
_COARSE = 4
_NEIGHBOURS = 8
_BLOCK = 10_000

# Root mean square difference of two small pictures, as a share of their contrast, or in grey levels if that is more.
_SHARE = 0.02
_LEVELS = 0.5
# Grey levels; what shows less than this looks like any other blank surface.
_FLAT = 2.5


def thumbnail(image: Image.Image) -> tuple[NDArray[np.float16], float]:
    """A small picture of an image, without its brightness and contrast.

    Args:
        image: Upright, of any size and any mode that converts to grey.

    Returns:
        [`SIDE`, `SIDE`] of mean 0 and variance 1; the contrast that it had, a standard deviation in grey levels.
    """
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    fine = image.resize((_FINE, _FINE), Image.Resampling.BILINEAR, reducing_gap=1.5).convert("L")
    cell = _FINE // SIDE
    columns = np.asarray(fine).reshape(SIDE, cell, _FINE).sum(axis=1, dtype=np.uint32)
    grey = columns.reshape(SIDE, SIDE, cell).sum(axis=2).astype(np.float32) / cell**2
    contrast = float(grey.std())
    return ((grey - grey.mean()) / max(contrast, 1e-3)).astype(np.float16), contrast


def coarse(thumbnails: NDArray[np.float16]) -> NDArray[np.float32]:
    """[images, `SIDE`, `SIDE`] -> [images, few]: vectors that are no further apart than the thumbnails are."""
    cells = _reduced(thumbnails.astype(np.float32), _COARSE)
    return cells.reshape(len(thumbnails), -1) / np.float32(_COARSE)


def near_duplicates(
    thumbnails: NDArray[np.float16], contrasts: NDArray[Any], vectors: NDArray[np.float32] | None = None
) -> NDArray[np.int64]:
    """The pairs of images that are one picture, saved twice.

    Every image is compared with the few that are nearest to it, so that time and memory grow with the number of
    images, however alike they are. Images without contrast have no duplicates.

    Args:
        thumbnails: [images, `SIDE`, `SIDE`], as `thumbnail` makes them.
        contrasts: [images], in grey levels.
        vectors: [images, few], as `coarse` makes them. With these given, only the thumbnails of likely duplicates are
            used, so that they may be mapped from a file.

    Returns:
        [pairs, 2]: indices of images.
    """
    from scipy.spatial import KDTree

    if vectors is None:
        vectors = coarse(thumbnails)
    found = [np.empty((0, 2), np.int64)]
    # A fainter picture may be further from its copy, so each band of contrast has a bound of its own.
    for low in (_FLAT, 5.0, 10.0, 20.0):
        high = np.inf if low == 20 else 2.5 * low
        some = np.flatnonzero((contrasts >= low) & (contrasts < high))
        if len(some) > 1:
            bound = max(_SHARE, _LEVELS / low)
            tree = KDTree(vectors[some])
            for start in range(0, len(some), _BLOCK):  # a query for all at once takes 400 bytes an image
                these = some[start : start + _BLOCK]
                _, near = tree.query(
                    vectors[these], k=min(len(some), _NEIGHBOURS + 1), distance_upper_bound=bound, workers=-1
                )
                first, second = np.repeat(these, near.shape[1]), near.ravel()
                kept = second < len(some)
                pairs = np.sort(np.stack([first[kept], some[second[kept]]], axis=1), axis=1)
                found.append(pairs[pairs[:, 0] != pairs[:, 1]])
    candidates = np.unique(np.concatenate(found), axis=0)
    kept_pairs = [candidates[:0]]
    for start in range(0, len(candidates), 1000):
        pairs = candidates[start : start + 1000]
        one, other = (np.asarray(thumbnails[pairs[:, side]], np.float32) for side in (0, 1))
        apart = np.sqrt(((one - other) ** 2).mean(axis=(1, 2)))
        bounds = np.maximum(_SHARE, _LEVELS / np.minimum(contrasts[pairs[:, 0]], contrasts[pairs[:, 1]]))
        kept_pairs.append(pairs[apart <= bounds])
    return np.concatenate(kept_pairs)


def clusters(pairs: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The indices of the images that hang together by pairs, cluster by cluster."""
    images, ends = np.unique(pairs, return_inverse=True)
    numbers = components(ends.reshape(-1, 2), len(images))
    order = np.argsort(numbers, kind="stable")
    return np.split(images[order], np.cumsum(np.bincount(numbers))[:-1]) if len(images) else []


def components(pairs: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """[images]: the number of the component that each image belongs to, from the [pairs, 2] that hang together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(images, images))
    return np.asarray(connected_components(edges, directed=False)[1], np.int64)


def _reduced(grey: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Means of cells: [..., n, n] -> [..., side, side]."""
    cell = grey.shape[-1] // side
    reduced: NDArray[np.float32] = grey.reshape(*grey.shape[:-2], side, cell, side, cell).mean(axis=(-3, -1))
    return reduced
