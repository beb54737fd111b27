"""Find near-duplicates: one picture saved twice, in another format, size or brightness."""

from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adfm.process import cpus

# Thumbnails are compared, not perceptual hashes of a few bits: photographs of two parts on one rig look alike, are not
# duplicates, and have the same hash (docs/experiments.md).
# A thumbnail of 64 x 64 tells a moved part from a copy 1.6 times as sharply, and takes four times the space.
SIDE = 32
# Thumbnails of 256 x 256 take 0.3 ms more of a JPEG, and find the same copies.
_FINE = 128
# Means of 8 x 8 cells alone called 12 of 313,000 pairs wrongly; 4 x 4 and 32 projections called none.
_COARSE = 4
_PROJECTED = 32
_NEIGHBOURS = 8
_BLOCK = 10_000

# Root mean square difference of two thumbnails, as a share of their contrast, or in grey levels if that is more. Copies
# as JPEG of quality 50 to 95, or a quarter smaller or larger, are closer; the same part, photographed again and moved
# by a pixel, is further away, and another part ten times as far (docs/experiments.md).
_SHARE = 0.02
_LEVELS = 0.5
_FLAT = 2.5  # grey levels; an image of less contrast looks like any other blank surface

Pairs = NDArray[np.int64]  # [pairs, 2]: the indices of two images
# Near-duplicates are not as far apart by sketches, as a share of the bound: four standard errors of the estimate.
UNLIKELY = 1.5


class Looks(NamedTuple):
    """Appearance of images, as near-duplicates are searched by it."""

    # [images, SIDE, SIDE], as `thumbnail` makes them. Only those of likely duplicates are read: they may be mapped.
    thumbnails: NDArray[np.float16]
    contrasts: NDArray[Any]  # [images], in grey levels; an image without contrast has no duplicates
    vectors: NDArray[np.float32]  # [images, few], as `coarse` makes them


def mapped(file: Path | IO[bytes]) -> NDArray[np.float16]:
    """Map a file of thumbnails, one after another, to [images, `SIDE`, `SIDE`]."""
    return np.memmap(file, np.float16, "r").reshape(-1, SIDE, SIDE)


def thumbnail(image: Image.Image) -> tuple[NDArray[np.float16], float]:
    """Return a small grey picture of an upright image, without its brightness and contrast.

    Returns:
        [`SIDE`, `SIDE`] of mean 0 and variance 1; the contrast that it had, a standard deviation in grey levels.
    """
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    # Pillow reduces by whole factors first, to 1.5 times the size. Reduced all the way by whole factors, images of 320
    # pixels and their enlargement differ; a box filter finds 41 % of the copies at half the size, this 87 %.
    fine = image.resize((_FINE, _FINE), Image.Resampling.BILINEAR, reducing_gap=1.5).convert("L")
    cell = _FINE // SIDE
    columns = np.asarray(fine).reshape(SIDE, cell, _FINE).sum(axis=1, dtype=np.uint32)
    grey = columns.reshape(SIDE, SIDE, cell).sum(axis=2).astype(np.float32) / cell**2
    contrast = float(grey.std())
    return ((grey - grey.mean()) / max(contrast, 1e-3)).astype(np.float16), contrast


def coarse(thumbnails: NDArray[np.float16]) -> NDArray[np.float32]:
    """Reduce [images, `SIDE`, `SIDE`] to [images, few]: vectors that are no further apart than the thumbnails are."""
    cells = _reduced(thumbnails.astype(np.float32), _COARSE)
    return cells.reshape(len(thumbnails), -1) / np.float32(_COARSE)


def sketch(thumbnails: NDArray[np.float16]) -> NDArray[np.float16]:
    """Reduce [images, `SIDE`, `SIDE`] to [images, 48], whose distances are those of the thumbnails to about a tenth."""
    # The first numbers are those of `coarse`. The others are random projections of what it leaves, whose distances
    # estimate those of all the pixels (Johnson and Lindenstrauss, 1984; with signs alone: Achlioptas,
    # "Database-friendly random projections", 2003).
    rest = thumbnails.astype(np.float32)
    cell = SIDE // _COARSE
    rest -= _reduced(rest, _COARSE).repeat(cell, axis=-2).repeat(cell, axis=-1)
    # The stream of RandomState never changes (NumPy's NEP 19), and sketches of other days are compared.
    signs = np.random.RandomState(0).choice([-1, 1], (SIDE**2, _PROJECTED)).astype(np.float32)
    projected = rest.reshape(len(rest), -1) @ signs / np.float32(SIDE * np.sqrt(_PROJECTED))
    return np.concatenate([coarse(thumbnails), projected], axis=1).astype(np.float16)


def likely_copies(
    sketches: NDArray[np.float16], contrasts: NDArray[Any], others: NDArray[np.float16], other_contrasts: NDArray[Any]
) -> tuple[Pairs, NDArray[np.float64]]:
    """Return the pairs of an image and one of other images that may be near-duplicates, judged by sketches.

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
    """Return for each pair of thumbnails, [pairs, `SIDE`, `SIDE`], whether they are of one picture, saved twice."""
    apart = np.sqrt(((thumbnails.astype(np.float32) - others.astype(np.float32)) ** 2).mean(axis=(1, 2)))
    return np.asarray(apart <= _bound(contrasts, other_contrasts))


def near_duplicates(looks: Looks) -> Pairs:
    """Return the pairs of images that are one picture, saved twice, as [pairs, 2] of indices."""
    # Each is compared with the few nearest to it: time and memory grow with the number of images, however alike.
    pairs = np.sort(_within_reach(looks.vectors, looks.contrasts, looks.vectors, looks.contrasts), axis=1)
    return _confirmed(np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0), looks)


def near_duplicates_across(looks: Looks, splits: NDArray[np.int8]) -> Pairs:
    """Return the pairs of images in different `splits` that are one picture, saved twice, as [pairs, 2] of indices."""
    # Where many images are copies, the few nearest to each may all be in its own split, and `near_duplicates` misses
    # those in others. Here each is compared with the few nearest in the splits before, as `separation` does.
    _, contrasts, vectors = looks
    pairs = [np.empty((0, 2), np.int64)]
    for split in np.unique(splits)[1:]:
        some, before = np.flatnonzero(splits == split), np.flatnonzero(splits < split)
        near = _within_reach(vectors[some], contrasts[some], vectors[before], contrasts[before])
        pairs.append(np.stack([some[near[:, 0]], before[near[:, 1]]], axis=1))
    return _confirmed(np.unique(np.concatenate(pairs), axis=0), looks)


def _confirmed(pairs: Pairs, looks: Looks) -> Pairs:
    kept = [pairs[:0]]
    for start in range(0, len(pairs), 1000):
        some = pairs[start : start + 1000]
        one, other = some.T
        close = are_copies(looks.thumbnails[one], looks.contrasts[one], looks.thumbnails[other], looks.contrasts[other])
        kept.append(some[close])
    return np.concatenate(kept)


def _bound(contrasts: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.maximum(_SHARE, _LEVELS / np.minimum(contrasts, others)))


def _within_reach(
    vectors: NDArray[np.float32], contrasts: NDArray[Any], others: NDArray[np.float32], other_contrasts: NDArray[Any]
) -> Pairs:
    """Return [pairs, 2]: the index of an image, and of one of the few `others` nearest to it, within the bound."""
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
                nearest = list(range(1, min(len(among), _NEIGHBOURS + 1) + 1))
                workers = cpus.count()  # -1 would be the cores of the machine, whatever the pod's limit
                _, near = tree.query(vectors[these], k=nearest, distance_upper_bound=bound, workers=workers)
                first, second = np.repeat(these, near.shape[1]), near.ravel()
                kept = second < len(among)
                reached.append(np.stack([first[kept], among[second[kept]]], axis=1))
    return np.concatenate(reached)


def clusters(pairs: Pairs) -> list[NDArray[np.int64]]:
    """Return the connected components of [pairs, 2]: the indices of the images of each."""
    images, ends = np.unique(pairs, return_inverse=True)
    numbers = components(ends.reshape(-1, 2), len(images))
    order = np.argsort(numbers, kind="stable")
    return np.split(images[order], np.cumsum(np.bincount(numbers))[:-1]) if len(images) else []


def components(pairs: Pairs, images: int) -> NDArray[np.int64]:
    """Return [images], the number of each image's connected component in the graph of [pairs, 2]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(images, images))
    return np.asarray(connected_components(edges, directed=False)[1], np.int64)


def _reduced(grey: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return the means of cells: [..., n, n] -> [..., side, side]."""
    cell = grey.shape[-1] // side
    return np.asarray(grey.reshape(*grey.shape[:-2], side, cell, side, cell).mean(axis=(-3, -1)))
