"""Divide images into train, validation and test, so that no part and no copy is in two of them."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adfm.data.duplicates import Pairs, components
from adfm.params import Params, Split
from adfm.records import SPLITS

# Of a `Sample`; `part` is from `split.group`, and augmented copies of one photograph share `photograph`.
COLUMNS = ("dataset", "category", "label", "defect", "split", "group", "part", "photograph", "sha256")
_TRAIN, _VALIDATION, _TEST = map(SPLITS.index, ("train", "validation", "test"))


def assign(images: pa.Table, duplicates: Pairs, params: Params) -> NDArray[np.int8]:
    """Assign every image to a split.

    **Together**: byte-identical images, `duplicates`, images of one category with the same `group`, and images with the
    same `part` or `photograph` go to one split: the most held-out one to which the data set, or
    `split.holdout_categories`, which are wholly test, assigns any of them.

    **What the data set fixes**: if its train part has defects, every image that has a split keeps it. Validation and
    test, where the data set has no such part, are drawn from train (and from what has no split), by their shares in
    `params.split`. If all of it is test, as in MMAD, it stays so. If its train part has normal images alone, as in
    MVTec AD, they stay in train, and all the rest is divided. With `split.redivide` nothing counts as fixed.

    **The division** keeps the shares in every category, and as nearly as whole groups allow in every label and defect
    of it. A label with three groups or more is in every split, and so is a kind of defect, if images of several kinds
    (`dent+scratch`) allow it; one with two is in train and test, one with a single group in train, and never judged.

    Args:
        images: One row an image, with `COLUMNS`.
        duplicates: [pairs, 2]: further indices of images that go to one split.
        params: Reads `seed` and `split`.

    Returns:
        [images]: indices into `SPLITS`.
    """
    column = _columns(images)
    fixed, keeps = _fixed(column, params.split)
    fractions = [0.0, params.split.validation, params.split.test]  # of `SPLITS`
    if keeps:  # a split that the data set has gets no more
        fractions = [0.0 if (fixed == number).any() else share for number, share in enumerate(fractions)]
    fractions[_TRAIN] = 1 - sum(fractions)
    for name in params.split.holdout_categories:
        fixed[_where(column["category"], name)] = _TEST
    together = _together(column, duplicates)
    count = int(together.max(initial=-1)) + 1
    latest = np.full(count, -1, np.int8)
    np.maximum.at(latest, together, fixed)  # `SPLITS` are in order, the most held-out one last
    all_train, held = np.ones(count, bool), np.zeros(count, bool)
    all_train[together[fixed != _TRAIN]] = False
    held[together[np.isin(np.asarray(column["category"]), params.split.holdout_categories)]] = True
    # A training part of normal images alone, as in MVTec AD, stays, but the rest is divided: training needs defects.
    decided = held | (latest > _TRAIN if keeps else all_train)
    of_group = np.where(decided, latest, np.int8(-1))
    for pool in _pools(column, together, decided, params.seed):
        for group, split in _divide(pool, fractions, _first_splits(fractions)).items():
            of_group[group] = split
    return of_group[together]


def folds(images: pa.Table, duplicates: Pairs, count: int, validation: float, seed: int) -> NDArray[np.int8]:
    """Divide images for cross-validation: each is in the test split of one fold.

    Images that `assign` keeps together are in one part. Every part has its share of each category, label and defect as
    nearly as whole groups allow; a kind of defect with fewer groups than parts is in as many parts as it has groups, so
    that one with two is always trained on before it is judged. The rest of a fold is divided as `assign` divides, with
    `validation` as the share of validation.

    Returns:
        [folds, images]: indices into `SPLITS`.
    """
    column = _columns(images)
    together = _together(column, duplicates)
    part = np.full(int(together.max(initial=-1)) + 1, -1)

    def pool(decided: NDArray[np.bool_]) -> list[_Group]:
        # All categories at once, which keeps the sizes to an image and each label in every part.
        groups = []
        for number, of_category in enumerate(_pools(column, together, decided, seed)):
            for group in of_category:
                kinds = frozenset(f"{number} {kind}" for kind in group.kinds)
                groups.append(group._replace(defect=f"{number:09} {group.defect}", kinds=kinds))
        return groups

    for group, number in _divide(pool(part >= 0), [1 / count] * count, _any_parts(count)).items():
        part[group] = number
    fractions = [1 - validation, validation, 0.0]
    of_fold = np.full((count, len(part)), _TEST, np.int8)
    for fold in range(count):
        # Kinds first: with few defects left, the rule that validation has every label would take the only one of a kind
        # away from training.
        divided = _divide(pool(part == fold), fractions, _first_splits(fractions), kinds_first=True)
        for group, split in divided.items():
            of_fold[fold, group] = split
    return of_fold[:, together]


def groups(images: pa.Table, duplicates: Pairs) -> NDArray[np.int64]:
    """Return [images], the number of the group of images that `assign` keeps together."""
    return _together(_columns(images), duplicates)


def official_kept(images: pa.Table, settings: Split) -> bool:
    """Return whether `assign` keeps the data set's own splits, and not only a training part of normal images."""
    return _fixed(_columns(images), settings)[1]


def _columns(images: pa.Table) -> dict[str, pa.Array]:
    """Return `COLUMNS`, dictionary-encoded but for the two that have about as many values as images."""
    column = {name: images[name].combine_chunks() for name in COLUMNS}
    encoded = [name for name in COLUMNS if name not in ("sha256", "photograph")]
    return column | {name: column[name].dictionary_encode() for name in encoded}


def _where(column: pa.Array, value: str) -> NDArray[np.bool_]:
    return np.asarray(pc.equal(column, value).fill_null(False), bool)


def _fixed(column: dict[str, pa.Array], settings: Split) -> tuple[NDArray[np.int8], bool]:
    """Return the split that the data set fixes, -1 for none, by image; and whether all are kept, not only train."""
    fixed = np.full(len(column["split"]), -1, np.int8)
    # With `split.redivide` a share of MMAD can be trained on; its metrics do not compare with published ones then.
    for number, name in enumerate(() if settings.redivide else SPLITS):
        fixed[_where(column["split"], name)] = number
    anomalous = _where(column["label"], "anomalous")
    return fixed, bool((anomalous & (fixed == _TRAIN)).any() or (fixed == _TEST).all())


def _ties(column: dict[str, pa.Array]) -> dict[str, Pairs]:
    """Return [pairs, 2] of images that go to one split, by the reason."""
    category, group = column["category"], column["group"]
    groups = pc.add(pc.multiply(category.indices.cast("int64"), len(group.dictionary)), group.indices)
    parts = [repeated(groups), repeated(column["part"]), repeated(column["photograph"])]
    return {"copies": repeated(column["sha256"]), "part": np.concatenate(parts)}


def _together(column: dict[str, pa.Array], duplicates: Pairs) -> NDArray[np.int64]:
    return components(np.concatenate([*_ties(column).values(), duplicates]), len(column["label"]))


def moved(images: pa.Table, duplicates: Pairs, assigned: NDArray[np.int8], settings: Split) -> list[dict[str, Any]]:
    """Count the images that `assign` did not leave in the split that the data set fixes for them, because of others.

    Returns:
        Rows of `because` (`copies`, `part` or `near-duplicates`: the first that explains it), `from`, `to`, `images`.
    """
    column = _columns(images)
    fixed, keeps = _fixed(column, settings)
    held = np.isin(np.asarray(column["category"]), settings.holdout_categories)
    left = (fixed != assigned) & (fixed >= 0) & ~held
    if not keeps:
        left &= fixed == _TRAIN  # the rest is divided anyhow
    rows = []
    ties = duplicates[:0]
    of_split = np.where(held, np.int8(_TEST), fixed)
    for because, pairs in (_ties(column) | {"near-duplicates": duplicates}).items() if left.any() else ():
        ties = np.concatenate([ties, pairs])
        together = components(ties, len(images))
        lowest, highest = (np.full(len(images), start, np.int8) for start in (len(SPLITS), -1))
        np.minimum.at(lowest, together, of_split)
        np.maximum.at(highest, together, of_split)
        here = left & (lowest != highest)[together]
        left &= ~here
        codes, counts = np.unique(np.stack([fixed[here], assigned[here]]), axis=1, return_counts=True)
        rows += [
            {"because": because, "from": SPLITS[origin], "to": SPLITS[target], "images": count}
            for origin, target, count in zip(*codes.tolist(), counts.tolist(), strict=True)
        ]
    return rows


def repeated(values: pa.Array) -> Pairs:
    """Return [pairs, 2]: every row that repeats a value, and the first row that has it; nulls are equal to nothing."""
    # Sorting takes less memory than a dictionary of all values.
    order = np.asarray(pc.sort_indices(values))[: len(values) - values.null_count]  # nulls come last
    if not len(order):
        return np.empty((0, 2), np.int64)
    ordered = values.take(order)
    starts = np.flatnonzero(np.append(True, np.asarray(pc.not_equal(ordered[1:], ordered[:-1]))))
    firsts = np.repeat(np.minimum.reduceat(order, starts), np.diff(np.append(starts, len(order))))
    return np.asarray(np.stack([order, firsts], axis=1)[order != firsts], np.int64)


class _Group(NamedTuple):  # of images to divide; those of a pool are sorted in this order
    label: str  # of the image that it counts as
    defect: str  # of that image, or an empty text
    draw: int  # at random
    number: int
    images: int  # how many it has
    kinds: frozenset[str]  # of defect on its images; an anomalous image without a name has the kind ""


def _pools(
    column: dict[str, pa.Array], together: NDArray[np.int64], decided: NDArray[np.bool_], seed: int
) -> Iterator[list[_Group]]:
    """Yield the groups to divide, category by category."""
    sizes = np.bincount(together, minlength=len(decided))
    rank = {name: _ranks(column[name]) for name in ("dataset", "category", "defect")}
    rank["sha256"] = np.asarray(pc.rank(column["sha256"], tiebreaker="min"), np.int64)
    normal = ~_where(column["label"], "anomalous")
    smallest = _first_of_each(together, np.lexsort((rank["sha256"], together)))
    # As its anomalous image, if it has one, and of those as the one whose SHA-256 is the smallest.
    order = np.lexsort((rank["defect"], rank["category"], rank["sha256"], normal, together))
    counts_as = _first_of_each(together, order)
    open_ = np.flatnonzero(~decided)
    category = rank["dataset"] * (len(normal) + 1) + rank["category"]
    kinds = _kinds(column["defect"], together, np.flatnonzero(~normal & (category == category[counts_as][together])))
    strata = category[counts_as[open_]]
    for stratum in np.unique(strata):
        pool = []
        for group in open_[strata == stratum].tolist():
            label, defect = (column[name][int(counts_as[group])].as_py() for name in ("label", "defect"))
            # Drawn by content, so that neither order nor names of files matter.
            content = f"{seed} {column['sha256'][int(smallest[group])].as_py()}"
            draw = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8])
            pool.append(_Group(label, defect or "", draw, group, int(sizes[group]), frozenset(kinds[group])))
        yield pool


def _kinds(defect: pa.Array, together: NDArray[np.int64], anomalous: NDArray[np.int64]) -> dict[int, set[str]]:
    codes = np.asarray(defect.indices.fill_null(-1), np.int64)[anomalous]
    names = [*defect.dictionary.to_pylist(), ""]  # the last one, at -1, of images whose defect has no name
    kinds: dict[int, set[str]] = defaultdict(set)
    for group, code in np.unique(np.stack([together[anomalous], codes], axis=1), axis=0).tolist():
        kinds[group].update(kinds_of(names[code]))
    return kinds


def kinds_of(defect: str | None) -> list[str]:
    """Return the kinds of defect that an anomalous image shows: `dent+scratch` has two; `[""]` where it has no name."""
    return (defect or "").split("+")


def _ranks(column: pa.Array) -> NDArray[np.int64]:
    ranks = np.append(np.asarray(pc.rank(column.dictionary)), 0)  # 0 for null
    return np.asarray(ranks[column.indices.fill_null(-1)], np.int64)


def _first_of_each(together: NDArray[np.int64], order: NDArray[Any]) -> NDArray[Any]:
    _, first = np.unique(together[order], return_index=True)  # `order` has the groups one after another
    return order[first]


# Returns the splits in which a kind belongs, from the number of its groups in each split.
_Rule = Callable[[Counter[int]], Sequence[int]]


def _first_splits(fractions: Sequence[float]) -> _Rule:
    """Return the rule of `assign`: the groups of a rare kind go to train, then test, then validation, one each."""
    order = [split for split in (_TRAIN, _TEST, _VALIDATION) if fractions[split] > _NOTHING]
    return lambda here: order[: here.total()]


def _any_parts(count: int) -> _Rule:
    """Return the rule of `folds`: a rare kind is in as many parts as it has groups, where it is or the first others."""
    return lambda here: sorted(range(count), key=lambda part: not here[part])[: here.total()]


_NOTHING = 1e-9  # a smaller share is a rounding error


def _divide(pool: list[_Group], fractions: Sequence[float], places: _Rule, kinds_first: bool = False) -> dict[int, int]:
    """Return the split of each of one category's groups, by its number."""
    splits: dict[int, int] = {}
    counts: Counter[int] = Counter()
    filled = [split for split, fraction in enumerate(fractions) if fraction > _NOTHING]
    seen = 0
    # Label by label and defect by defect, each to the split that is furthest behind its fraction: at the end of
    # every stratum fractions hold to about one group.
    for *_, group, size, _ in sorted(pool):
        seen += size
        split = max(filled, key=lambda code: fractions[code] * seen - counts[code])
        splits[group] = split
        counts[split] += size
    # Then labels and kinds of defect that a split lacks are moved there.
    for label in {group.label for group in pool}:
        members = [group.number for group in sorted(pool, key=lambda group: group.draw) if group.label == label]
        for split in filled if len(members) >= len(filled) else ():
            here = Counter(splits[group] for group in members)
            if not here[split]:
                largest = max(range(len(fractions)), key=lambda code: here[code])
                splits[next(group for group in members if splits[group] == largest)] = split
    _spread(pool, splits, fractions, places, kinds_first)
    return splits


def _spread(
    pool: list[_Group], splits: dict[int, int], fractions: Sequence[float], places: _Rule, kinds_first: bool
) -> None:
    """Move groups so that kinds are where they belong; that takes no kind and, without `kinds_first`, no label away."""
    here: dict[str, Counter[int]] = defaultdict(Counter)  # kind -> split -> groups
    labels: dict[str, Counter[int]] = defaultdict(Counter)
    images: Counter[int] = Counter()
    for group in pool:
        images[splits[group.number]] += group.images
        labels[group.label][splits[group.number]] += 1
        for kind in group.kinds:
            here[kind][splits[group.number]] += 1

    def spared(group: _Group) -> bool:
        # Whether its split keeps its kinds without it.
        split = splits[group.number]
        return all(here[kind][split] > 1 or split not in places(here[kind]) for kind in group.kinds)

    def excess(split: int, more: int) -> float:
        return abs(images[split] + more - fractions[split] * images.total())

    def move(group: _Group, split: int) -> None:
        before = splits[group.number]
        for counter in (labels[group.label], *(here[kind] for kind in group.kinds)):
            counter[before] -= 1
            counter[split] += 1
        images[before] -= group.images
        images[split] += group.images
        splits[group.number] = split

    # Kinds with many groups first: once they are in every split, so is their label, and the rare ones are free.
    for kind in sorted(here, key=lambda kind: (-here[kind].total(), kind)):
        members = sorted((group for group in pool if kind in group.kinds), key=lambda group: group.draw)
        for split in places(here[kind]):
            donors = [] if here[kind][split] else [group for group in members if spared(group)]
            if not donors:
                continue
            donor = max(donors, key=lambda group: here[kind][splits[group.number]])
            origin, label = splits[donor.number], labels[donor.label]
            # Places are exchanged with one of the same label, or it moves alone if that brings the sizes closer.
            partners: list[_Group | None] = [
                group
                for group in sorted(pool, key=lambda group: group.draw)
                if splits[group.number] == split and group.label == donor.label and spared(group)
            ]
            if kinds_first or label[origin] > 1 or origin not in places(label):
                partners.append(None)
            if partners:
                more = [donor.images - (partner.images if partner else 0) for partner in partners]
                excesses = [excess(split, images_) + excess(origin, -images_) for images_ in more]
                partner = partners[excesses.index(min(excesses))]
                move(donor, split)
                if partner:
                    move(partner, origin)
