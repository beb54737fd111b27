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

from adfm.process import cpus

SIDE = 32
_FINE = 128
_COARSE = 4
_PROJECTED = 32
_NEIGHBOURS = 8
_BLOCK = 10_000

# Root mean square difference of two small pictures, as a share of their contrast, or in grey levels if that is more.
_SHARE = 0.02
_LEVELS = 0.5
# Grey levels; what shows less than this looks like any other blank surface.
_FLAT = 2.5

UNLIKELY = 1.5
"""Near-duplicates are not as far apart by sketches, as a share of the bound: four standard errors of the estimate."""


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


def sketch(thumbnails: NDArray[np.float16]) -> NDArray[np.float16]:
    """[images, `SIDE`, `SIDE`] -> [images, 48]: small enough to keep, and about as far apart as the thumbnails are.

    The first numbers are those of `coarse`. The others are random projections of what `coarse` leaves, whose distances
    estimate those of all the pixels (Johnson and Lindenstrauss, 1984; with signs alone: Achlioptas, "Database-friendly
    random projections", 2003). The distance of two sketches estimates that of the thumbnails to about a tenth.
    """
    rest = thumbnails.astype(np.float32)
    cell = SIDE // _COARSE
    rest -= _reduced(rest, _COARSE).repeat(cell, axis=-2).repeat(cell, axis=-1)
    # The stream of RandomState never changes (NumPy's NEP 19), and sketches of other days are compared.
    signs = np.random.RandomState(0).choice([-1, 1], (SIDE**2, _PROJECTED)).astype(np.float32)
    projected = rest.reshape(len(rest), -1) @ signs / np.float32(SIDE * np.sqrt(_PROJECTED))
    return np.concatenate([coarse(thumbnails), projected], axis=1).astype(np.float16)


def likely_copies(
    sketches: NDArray[np.float16],
    contrasts: NDArray[Any],
    others: NDArray[np.float16],
    other_contrasts: NDArray[Any],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of an image and one of other images that may be its near-duplicate, judged by sketches.

    Args:
        sketches: [images, 48], as `sketch` makes them.
        contrasts: [images], in grey levels.
        others: [others, 48]
        other_contrasts: [others]

    Returns:
        [pairs, 2]: index of the image, index of the other. [pairs]: their estimated distance, as a share of the largest
        that near-duplicates have. Above `UNLIKELY` no pair is listed.
    """
    first, second = (each[:, : _COARSE**2].astype(np.float32) for each in (sketches, others))
    pairs = np.unique(_within_reach(first, contrasts, second, other_contrasts), axis=0)
    shares = [np.empty(0)]
    for start in range(0, len(pairs), _BLOCK):
        one, other = pairs[start : start + _BLOCK].T
        apart = np.linalg.norm(sketches[one].astype(np.float32) - others[other].astype(np.float32), axis=1)
        shares.append(apart / _bound(contrasts[one], other_contrasts[other]))
    share = np.concatenate(shares)
    return pairs[share <= UNLIKELY], share[share <= UNLIKELY]


def are_copies(
    thumbnails: NDArray[np.float16], contrasts: NDArray[Any], others: NDArray[np.float16], other_contrasts: NDArray[Any]
) -> NDArray[np.bool_]:
    """[pairs]: whether each image is one picture with the other of the same index, saved twice.

    Args:
        thumbnails: [pairs, `SIDE`, `SIDE`]
        contrasts: [pairs], in grey levels.
        others: [pairs, `SIDE`, `SIDE`]
        other_contrasts: [pairs]
    """
    apart = np.sqrt(((thumbnails.astype(np.float32) - others.astype(np.float32)) ** 2).mean(axis=(1, 2)))
    close: NDArray[np.bool_] = apart <= _bound(contrasts, other_contrasts)
    return close


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
    if vectors is None:
        vectors = coarse(thumbnails)
    pairs = np.sort(_within_reach(vectors, contrasts, vectors, contrasts), axis=1)
    return _confirmed(np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0), thumbnails, contrasts)


def near_duplicates_across(
    thumbnails: NDArray[np.float16],
    contrasts: NDArray[Any],
    vectors: NDArray[np.float32],
    splits: NDArray[np.int8],
) -> NDArray[np.int64]:
    """The pairs of images in different splits that are one picture, saved twice.

    Where many images are copies, the few nearest to each may all be in its own split, and `near_duplicates` tells of
    none in another.

    Args:
        thumbnails: As of `near_duplicates`.
        contrasts: As of `near_duplicates`.
        vectors: As of `near_duplicates`.
        splits: [images], indices into `SPLITS`. Every image is compared with the few nearest in the splits before its
            own, as `adfm.evaluation.separation` does.

    Returns:
        [pairs, 2]: indices of images.
    """
    pairs = [np.empty((0, 2), np.int64)]
    for split in np.unique(splits)[1:]:
        some, before = np.flatnonzero(splits == split), np.flatnonzero(splits < split)
        near = _within_reach(vectors[some], contrasts[some], vectors[before], contrasts[before])
        pairs.append(np.stack([some[near[:, 0]], before[near[:, 1]]], axis=1))
    return _confirmed(np.unique(np.concatenate(pairs), axis=0), thumbnails, contrasts)


def _confirmed(pairs: NDArray[np.int64], thumbnails: NDArray[np.float16], contrasts: NDArray[Any]) -> NDArray[np.int64]:
    """Those of [pairs, 2] that are one picture, saved twice."""
    kept = [pairs[:0]]
    for start in range(0, len(pairs), 1000):
        some = pairs[start : start + 1000]
        (one, other), (of_one, of_other) = ([of[some[:, side]] for side in (0, 1)] for of in (thumbnails, contrasts))
        kept.append(some[are_copies(one, of_one, other, of_other)])
    return np.concatenate(kept)


def _bound(contrasts: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """The largest root mean square difference of the thumbnails of near-duplicates."""
    bound: NDArray[Any] = np.maximum(_SHARE, _LEVELS / np.minimum(contrasts, others))
    return bound


def _within_reach(
    vectors: NDArray[np.float32], contrasts: NDArray[Any], others: NDArray[np.float32], other_contrasts: NDArray[Any]
) -> NDArray[np.int64]:
    """[pairs, 2] of indices: every image, and the few of `others` nearest to it that may be its near-duplicates."""
    from scipy.spatial import KDTree

    reached = [np.empty((0, 2), np.int64)]
    # A fainter picture may be further from its copy, so each band of contrast has a bound of its own.
    for low in (_FLAT, 5.0, 10.0, 20.0):
        high = np.inf if low == 20 else 2.5 * low
        some, among = (np.flatnonzero((of >= low) & (of < high)) for of in (contrasts, other_contrasts))
        if len(some) and len(among):
            bound = max(_SHARE, _LEVELS / low)
            tree = KDTree(others[among])
            for start in range(0, len(some), _BLOCK):  # a query for all at once takes 400 bytes an image
                these = some[start : start + _BLOCK]
                _, near = tree.query(
                    vectors[these],
                    k=list(range(1, min(len(among), _NEIGHBOURS + 1) + 1)),
                    distance_upper_bound=bound,
                    workers=cpus.count(),
                )
                first, second = np.repeat(these, near.shape[1]), near.ravel()
                kept = second < len(among)
                reached.append(np.stack([first[kept], among[second[kept]]], axis=1))
    return np.concatenate(reached)


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
