"""Train, validation and test: which image goes where, such that none is in two."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adfm.data.duplicates import components
from adfm.params import Params, Split
from adfm.records import SPLITS
from adfm.records import Split as SplitName

COLUMNS = ("dataset", "category", "label", "defect", "split", "group", "part", "photograph", "sha256")
_TRAIN, _VALIDATION, _TEST = map(SPLITS.index, ("train", "validation", "test"))


def assign(images: pa.Table, duplicates: NDArray[np.int64], params: Params) -> NDArray[np.int8]:
    """Gives every image its split.

    **Together**: byte-identical images, `duplicates`, images of one category with the same `group`, and images with the
    same `part` or `photograph` go to one split: the most held-out one to which the data set, or
    `split.holdout_categories`, assigns any of them.

    **Held-out categories** are wholly test.

    **What the data set fixes**: if its train part has defects, every image that has a split keeps it. Validation and
    test, where the data set has no such part, are drawn from train (and from what has no split), by their shares in
    `params.split`. If all of it is test, as in MMAD, it stays so. If its train part has normal images alone, as in
    MVTec AD and its kin, they stay in train, and all the rest is divided by the shares: there must be defects to learn
    from. So the held-out images are always held-out images of the official split. If nothing is fixed, all is divided.
    With `split.redivide` nothing counts as fixed, so that a share of MMAD can be trained on; figures then do not
    compare with those of others, who test on all of it.

    **The division** keeps the shares in every category, and as nearly as whole groups allow in every label and defect
    of it. A label with three groups or more is in every split, and so is a kind of defect; one with two is in train and
    test, one with a single group in train, where it cannot be judged. Kinds that are shared by few images
    (`dent+scratch` is both a dent and a scratch) may not allow that. A group that is moved for it changes places with
    one of the same label, so that the sizes of the splits stay; where a split has no room for every kind, it grows.
    Groups are drawn by a hash of the seed and their content, so neither the order nor the names of files matter.

    Args:
        images: One row an image, with `COLUMNS` as in a `Sample`; `split` is what the data set fixes, or null, `part`
            what `split.group` says, `photograph` what augmented copies share.
        duplicates: [pairs, 2]: further indices of images that go to one split.
        params: Its `seed` and `split` are used.

    Returns:
        [images]: indices into `SPLITS`.
    """
    column = _columns(images)
    fixed = _fixed(column["split"], params.split)
    keeps = _keeps(fixed, _where(column["label"], "anomalous"))
    lacking = [name for number, name in enumerate(SPLITS) if not (fixed == number).any()] if keeps else list(SPLITS)
    shares = _fractions(params.split, lacking)
    fractions = [shares[name] for name in SPLITS]
    for name in params.split.holdout_categories:
        fixed[_where(column["category"], name)] = _TEST

    together = _together([*_ties(column).values(), duplicates], len(images))
    count = int(together.max(initial=-1)) + 1
    latest = np.full(count, -1, np.int8)
    np.maximum.at(latest, together, fixed)
    all_train = np.ones(count, bool)
    all_train[together[fixed != _TRAIN]] = False
    held = np.zeros(count, bool)
    held[together[np.isin(np.asarray(column["category"]), params.split.holdout_categories)]] = True
    decided = held | (latest > _TRAIN if keeps else all_train)

    of_group = np.where(decided, latest, np.int8(-1))
    for pool in _pools(column, together, decided, params.seed):
        for group, split in _divide(pool, fractions, _first_splits(fractions)).items():
            of_group[group] = split
    return of_group[together]


def folds(
    images: pa.Table, duplicates: NDArray[np.int64], count: int, validation: float, seed: int
) -> NDArray[np.int8]:
    """Divides images for cross-validation: each is in the test split of one fold.

    Images that `assign` keeps together are in one part. Every part has its share of each category, label and defect as
    nearly as whole groups allow; a kind of defect with fewer groups than parts is in as many parts as it has groups, so
    that one with two groups is always trained on before it is judged. The other parts of a fold are divided into train
    and validation as `assign` divides.

    Args:
        images: As of `assign`; its column `split` is not used.
        duplicates: As of `assign`.
        count: Number of folds, at least 2.
        validation: Share of validation in what is not test.
        seed: Draws the parts.

    Returns:
        [folds, images]: indices into `SPLITS`.
    """
    column, together = _columns(images), groups(images, duplicates)
    part = np.full(int(together.max(initial=-1)) + 1, -1)

    def pool(decided: NDArray[np.bool_]) -> list[_Group]:
        """All categories at once, which keeps the sizes to an image and each label in every part."""
        return [
            group._replace(
                defect=f"{number:09} {group.defect}", kinds=frozenset(f"{number} {kind}" for kind in group.kinds)
            )
            for number, of_category in enumerate(_pools(column, together, decided, seed))
            for group in of_category
        ]

    for group, number in _divide(pool(part >= 0), [1 / count] * count, _any_parts(count)).items():
        part[group] = number
    fractions = [1 - validation, validation, 0.0]
    of_fold = np.full((count, len(part)), _TEST, np.int8)
    for fold in range(count):
        divided = _divide(pool(part == fold), fractions, _first_splits(fractions), kinds_first=True)
        for group, split in divided.items():
            of_fold[fold, group] = split
    return of_fold[:, together]


def groups(images: pa.Table, duplicates: NDArray[np.int64]) -> NDArray[np.int64]:
    """[images]: the number of the group of images that go to one split, as of `assign`."""
    return _together([*_ties(_columns(images)).values(), duplicates], len(images))


def official_kept(images: pa.Table, params: Params) -> bool:
    """Whether the data set's own splits are kept, as of `assign`, and not only a training part of normal images."""
    column = _columns(images)
    return _keeps(_fixed(column["split"], params.split), _where(column["label"], "anomalous"))


def _columns(images: pa.Table) -> dict[str, pa.Array]:
    """`COLUMNS`, dictionary-encoded but for the two that have about as many values as images."""
    column = {name: images[name].combine_chunks() for name in COLUMNS}
    return {
        name: values if name in ("sha256", "photograph") else values.dictionary_encode()
        for name, values in column.items()
    }


def _where(column: pa.Array, value: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.equal(column, value).fill_null(False).to_numpy(zero_copy_only=False)
    return found


def _fractions(split: Split, lacking: list[SplitName]) -> dict[SplitName, float]:
    shares: dict[SplitName, float] = {"train": 0, "validation": split.validation, "test": split.test}
    shares = {name: share if name in lacking else 0 for name, share in shares.items()}
    return shares | {"train": 1 - sum(shares.values())}


def _fixed(split: pa.Array, settings: Split) -> NDArray[np.int8]:
    """[images]: the split that the data set fixes, an index into `SPLITS`; -1 where it fixes none, or none counts."""
    fixed = np.full(len(split), -1, np.int8)
    for number, name in enumerate(() if settings.redivide else SPLITS):
        fixed[_where(split, name)] = number
    return fixed


def _keeps(fixed: NDArray[np.int8], anomalous: NDArray[np.bool_]) -> bool:
    """Whether all of the data set's own splits are kept, not only its train part."""
    return bool((anomalous & (fixed == _TRAIN)).any() or (fixed == _TEST).all())


def _ties(column: dict[str, pa.Array]) -> dict[str, NDArray[np.int64]]:
    """[pairs, 2] of images that go to one split, by the reason."""
    category, group = column["category"], column["group"]
    groups = pc.add(pc.multiply(category.indices.cast("int64"), len(group.dictionary)), group.indices)
    parts = [repeated(groups), repeated(column["part"]), repeated(column["photograph"])]
    return {"copies": repeated(column["sha256"]), "part": np.concatenate(parts)}


def _together(ties: list[NDArray[np.int64]], images: int) -> NDArray[np.int64]:
    """[images]: the number of the group of images that go to one split."""
    return components(np.concatenate(ties), images)


def moved(
    images: pa.Table, near_duplicates: NDArray[np.int64], assigned: NDArray[np.int8], params: Params
) -> list[dict[str, Any]]:
    """Counts the images that are not in the split that the data set fixes for them, because of others.

    Args:
        images: As of `assign`.
        near_duplicates: Its `duplicates`.
        assigned: What it returned.
        params: As of `assign`.

    Returns:
        Rows of `because` (`copies`, `part` or `near-duplicates`: the first that explains it), `from`, `to`, `images`.
    """
    column = _columns(images)
    fixed = _fixed(column["split"], params.split)
    held = np.isin(np.asarray(column["category"]), params.split.holdout_categories)
    left = (fixed != assigned) & (fixed >= 0) & ~held
    if not _keeps(fixed, _where(column["label"], "anomalous")):
        left &= fixed == _TRAIN  # the rest is divided anyhow
    rows = []
    ties: list[NDArray[np.int64]] = []
    of_split = np.where(held, np.int8(_TEST), fixed)
    for because, pairs in (_ties(column) | {"near-duplicates": near_duplicates}).items() if left.any() else ():
        ties.append(pairs)
        together = _together(ties, len(images))
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


def repeated(values: pa.Array) -> NDArray[np.int64]:
    """[pairs, 2]: every row that repeats a value, and the first row that has it; nulls are equal to nothing."""
    order = np.asarray(pc.sort_indices(values))[: len(values) - values.null_count]  # nulls come last
    if not len(order):
        return np.empty((0, 2), np.int64)
    ordered = values.take(order)
    starts = np.flatnonzero(np.append(True, np.asarray(pc.not_equal(ordered[1:], ordered[:-1]))))
    firsts = np.repeat(np.minimum.reduceat(order, starts), np.diff(np.append(starts, len(order))))
    return np.asarray(np.stack([order, firsts], axis=1)[order != firsts], np.int64)


class _Group(NamedTuple):
    """A group of images to divide; groups of a pool are sorted in this order.

    Args:
        label: Label of the image that it counts as.
        defect: Defect of that image, or an empty text.
        draw: A number by chance.
        number: Number of the group.
        images: How many images it has.
        kinds: Kinds of defect on its images; an anomalous image without a name has the kind "".
    """

    label: str
    defect: str
    draw: int
    number: int
    images: int
    kinds: frozenset[str]


def _pools(
    column: dict[str, pa.Array], together: NDArray[np.int64], decided: NDArray[np.bool_], seed: int
) -> Iterator[list[_Group]]:
    """The groups to divide, category by category.

    A group counts as its anomalous image, if it has one, and of those as the one whose SHA-256 is the smallest.
    """
    sizes = np.bincount(together, minlength=len(decided))
    rank = {name: _ranks(column[name]) for name in ("dataset", "category", "defect")}
    rank["sha256"] = np.asarray(pc.rank(column["sha256"], tiebreaker="min"), np.int64)
    normal = ~_where(column["label"], "anomalous")
    smallest = _first_of_each(together, np.lexsort((rank["sha256"], together)))
    shown = _first_of_each(together, np.lexsort((rank["defect"], rank["category"], rank["sha256"], normal, together)))
    open_ = np.flatnonzero(~decided)
    category = rank["dataset"] * (len(normal) + 1) + rank["category"]
    kinds = _kinds(column["defect"], together, np.flatnonzero(~normal & (category == category[shown][together])))
    strata = category[shown[open_]]
    for stratum in np.unique(strata):
        pool = []
        for group in open_[strata == stratum].tolist():
            label, defect = (column[name][int(shown[group])].as_py() for name in ("label", "defect"))
            content = f"{seed} {column['sha256'][int(smallest[group])].as_py()}"
            draw = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8])
            pool.append(_Group(label, defect or "", draw, group, int(sizes[group]), frozenset(kinds[group])))
        yield pool


def _kinds(defect: pa.Array, together: NDArray[np.int64], anomalous: NDArray[np.int64]) -> dict[int, set[str]]:
    """The kinds of defect of every group: the names in the `defect` of its `anomalous` images (row numbers)."""
    codes = np.asarray(defect.indices.fill_null(-1), np.int64)[anomalous]
    names = [*defect.dictionary.to_pylist(), ""]  # the last one, at -1, of images whose defect has no name
    kinds: dict[int, set[str]] = defaultdict(set)
    for group, code in np.unique(np.stack([together[anomalous], codes], axis=1), axis=0).tolist():
        kinds[group].update(kinds_of(names[code]))
    return kinds


def kinds_of(defect: str | None) -> list[str]:
    """The kinds of defect that an anomalous image shows: `dent+scratch` has two; `[""]` where it has no name."""
    return (defect or "").split("+")


def _ranks(column: pa.Array) -> NDArray[np.int64]:
    """[images]: the place of every value among those of the column, in alphabetical order; 0 for null."""
    ranks = np.append(np.asarray(pc.rank(column.dictionary)), 0)
    return np.asarray(ranks[column.indices.fill_null(-1)], np.int64)


def _first_of_each(together: NDArray[np.int64], order: NDArray[Any]) -> NDArray[Any]:
    """[groups]: of every group, the image that comes first in `order`, which has the groups one after another."""
    _, first = np.unique(together[order], return_index=True)
    return order[first]


_Places = Callable[[Counter[int]], Sequence[int]]
"""The splits in which a kind belongs, from the number of its groups in each split."""


def _first_splits(fractions: Sequence[float]) -> _Places:
    """Each group of a rare kind has a split of its own: train before test before validation, then anywhere."""
    order = [split for split in (_TRAIN, _TEST, _VALIDATION) if fractions[split] > _NOTHING]
    return lambda here: order[: here.total()]


def _any_parts(count: int) -> _Places:
    """A rare kind is in as many of `count` parts as it has groups: in those where it is, and in the first others."""
    return lambda here: sorted(range(count), key=lambda part: not here[part])[: here.total()]


_NOTHING = 1e-9  # a share that is smaller is none


def _divide(
    pool: list[_Group], fractions: Sequence[float], places: _Places, kinds_first: bool = False
) -> dict[int, int]:
    """Divides one category's groups.

    Each next group, label by label and defect by defect, goes to the split that is furthest behind its fraction, so
    fractions hold at the end of every stratum to about one group. Then labels and kinds of defect that a split lacks
    are moved there.

    Args:
        pool: The groups.
        fractions: Of every split; they sum to 1.
        places: Where a kind belongs.
        kinds_first: Whether a kind goes where it belongs even if a label then lacks in another split.

    Returns:
        The split of each group, by its number.
    """
    splits: dict[int, int] = {}
    counts: Counter[int] = Counter()
    filled = [split for split, fraction in enumerate(fractions) if fraction > _NOTHING]
    seen = 0
    for *_, group, size, _ in sorted(pool):
        seen += size
        split = max(filled, key=lambda code: fractions[code] * seen - counts[code])
        splits[group] = split
        counts[split] += size

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
    pool: list[_Group], splits: dict[int, int], fractions: Sequence[float], places: _Places, kinds_first: bool
) -> None:
    """Moves groups such that kinds of defect are where they belong, as far as that takes no other kind or label away.

    With `kinds_first` it may take a label away.

    A group changes places with one of the same label, or moves alone if that brings the sizes closer to `fractions`.
    Kinds with many groups come first: once they are in every split, so is their label, and the rare ones are free.
    """
    here: dict[str, Counter[int]] = defaultdict(Counter)  # kind -> split -> groups
    labels: dict[str, Counter[int]] = defaultdict(Counter)
    images: Counter[int] = Counter()
    for group in pool:
        images[splits[group.number]] += group.images
        labels[group.label][splits[group.number]] += 1
        for kind in group.kinds:
            here[kind][splits[group.number]] += 1

    def spared(group: _Group) -> bool:
        """Whether the split that a group is in has what it shows without it."""
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

    for kind in sorted(here, key=lambda kind: (-here[kind].total(), kind)):
        members = sorted((group for group in pool if kind in group.kinds), key=lambda group: group.draw)
        for split in places(here[kind]):
            donors = [] if here[kind][split] else [group for group in members if spared(group)]
            if not donors:
                continue
            donor = max(donors, key=lambda group: here[kind][splits[group.number]])
            origin, label = splits[donor.number], labels[donor.label]
            partners: list[_Group | None] = [
                group
                for group in sorted(pool, key=lambda group: group.draw)
                if splits[group.number] == split and group.label == donor.label and spared(group)
            ]
            if kinds_first or label[origin] > 1 or origin not in places(label):
                partners.append(None)

            def moved_excess(
                partner: _Group | None, donor: _Group = donor, split: int = split, origin: int = origin
            ) -> float:
                more = donor.images - (partner.images if partner else 0)
                return excess(split, more) + excess(origin, -more)

            if partners:
                partner = min(partners, key=moved_excess)
                move(donor, split)
                if partner:
                    move(partner, origin)
